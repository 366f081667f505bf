"""What importing MLX and mlx-lm costs a process, and leaves behind in it."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import resource, sys
read = []

def hear(event, given):
    if event == "open" and str(given[0]).endswith("models/llama/modeling_llama.py"):
        read.append(given[0])

sys.addaudithook(hear)
finders, files = list(sys.meta_path), resource.getrlimit(resource.RLIMIT_NOFILE)
from edger1 import mlx_runtime
mlx_runtime.prepare()
print(len(read), [f for f in sys.meta_path if f not in finders and "transformers" not in type(f).__module__])
from pathlib import Path
import transformers
from transformers import AutoTokenizer, LlamaTokenizer
from transformers.utils import import_utils
names = set()
for path in Path(transformers.__file__).parent.glob("models/l*/*.py"):
    names.update(import_utils.fetch__all__(path.read_text("utf-8")))
print({"LlamaConfig", "LlamaForCausalLM", "LlavaConfig", "LongformerModel"} <= names)
print(resource.getrlimit(resource.RLIMIT_NOFILE) == files)
"""


def test_sources_of_models_are_read_once_and_nothing_stays_behind() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("1 []\nTrue\nTrue\n", "")
