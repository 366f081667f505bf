"""The chat's screens beside the conversation: one file a screen."""
