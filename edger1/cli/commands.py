"""All commands of the command line."""

from __future__ import annotations

from edger1.cli.chat import chat_command
from edger1.cli.chats import chats_app
from edger1.cli.convert import convert_command
from edger1.cli.data import data_command
from edger1.cli.demo import demo_command
from edger1.cli.distill import distill_command
from edger1.cli.doctor import doctor_command
from edger1.cli.evaluate import evaluate_command
from edger1.cli.export import export_command
from edger1.cli.finetune import finetune_command
from edger1.cli.fuse import fuse_command
from edger1.cli.models import models_app
from edger1.cli.pairs import pairs_command
from edger1.cli.plan import plan_command
from edger1.cli.program import QuickCommand, program
from edger1.cli.pull import pull_command
from edger1.cli.run import run_command
from edger1.cli.verify import verify_command

app = program()
app.command("chat", cls=QuickCommand)(chat_command)
app.add_typer(chats_app, name="chats")
app.command("run")(run_command)
app.command("demo")(demo_command)
app.command("pull")(pull_command)
app.command("convert")(convert_command)
app.add_typer(models_app, name="models")
app.command("plan")(plan_command)
app.command("data")(data_command)
app.command("finetune")(finetune_command)
app.command("distill")(distill_command)
app.command("pairs")(pairs_command)
app.command("fuse")(fuse_command)
app.command("export")(export_command)
app.command("verify")(verify_command)
app.command("eval")(evaluate_command)
app.command("doctor")(doctor_command)
