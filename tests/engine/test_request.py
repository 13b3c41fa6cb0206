import subprocess
import sys

CODE = """
import sys
sys.modules.update(dict.fromkeys(["torch", "numpy", "transformers", "ray"]))  # None: cannot be imported
import framework.engine.request, framework.text.chat, framework.text.stream, framework.text.tokenizer
assert not {"jinja2", "tokenizers"} & set(sys.modules), "imported before it is needed"
"""


def test_the_driver_makes_requests_and_text_without_torch():
    subprocess.run([sys.executable, "-c", CODE], check=True)
