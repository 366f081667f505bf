"""Data for a small model of reasoning: problems made by code, with their solutions; README.md here tells how."""
