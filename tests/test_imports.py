import json
import subprocess
import sys

import pytest
from remote.endpoint import Endpoint, speaks

HEAVY = ("torch", "transformers", "peft", "fastapi", "bm25s")


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("mistral_rerank", (*HEAVY, "langchain_core", "llama_index")),
        ("langchain_mistral_rerank", (*HEAVY, "llama_index")),
        ("llama_index_mistral_rerank", (*HEAVY, "langchain_core")),
    ],
)
def test_importing_a_package_loads_nothing_heavy(module, absent):
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"


LOADED = "print([name for name in {names!r} if name in sys.modules])"
FRAMEWORKS = ("transformers", "peft", "accelerate", "bitsandbytes", "scipy", "sklearn", "torchvision")
COMPILER = ("torch._dynamo", "torch._inductor", "sympy")


def run_command(*arguments, names):
    code = (
        f"import sys; sys.argv = ['mistral-rerank', *{arguments!r}]\n"
        "from mistral_rerank.cli import main\n"
        "try: main()\n"
        f"finally: {LOADED.format(names=names)}"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def test_rank_with_mini_loads_neither_transformers_nor_peft_nor_the_compiler_of_torch(tmp_path):
    passages = tmp_path / "passages.txt"
    passages.write_text("Paris is the capital of France.\nYeast makes bread rise.\n", "utf-8")
    names = (*FRAMEWORKS, *COMPILER, "huggingface_hub", "langchain_core", "llama_index", "fastapi", "bm25s")
    ranked = run_command("rank", "Why does bread rise?", str(passages), "--json", "--device", "cpu", names=names)
    assert json.loads(ranked[0])["index"] == 1
    assert ranked[-1] == "[]"


def test_rank_at_an_endpoint_loads_no_torch(tmp_path):
    passages = tmp_path / "passages.txt"
    passages.write_text("Paris is the capital of France.\nYeast makes bread rise.\n", "utf-8")
    with Endpoint(speaks("nvidia")) as endpoint:
        options = ("--backend", "remote", "--base-url", endpoint.url, "--protocol", "nvidia", "--json")
        output = run_command("rank", "Why?", str(passages), *options, names=("torch", "numpy", *FRAMEWORKS))
    assert output[-1] == "[]"


def test_the_demo_at_an_endpoint_needs_the_base_install_alone():
    with Endpoint(speaks("nvidia")) as endpoint:
        options = ("--backend", "remote", "--base-url", endpoint.url, "--protocol", "nvidia")
        output = run_command("demo", *options, names=("torch", "numpy", *FRAMEWORKS))
    assert output[-2].strip().startswith("mistral-rerank rank")
    assert output[-1] == "[]"


def test_help_loads_no_torch():
    assert run_command("--help", names=("torch", "numpy", *FRAMEWORKS))[-1] == "[]"


def test_without_torch_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import mistral_rerank\n"
        "try: mistral_rerank.open_reranker('mini')\n"
        "except mistral_rerank.MissingDependencyError as error: print(error)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'mistral-rerank[local]'" in process.stdout


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (("info",), "local"),
        (("bench",), "local"),
        (("train", "--data", ".", "--out", "o"), "train"),
        (("mine", "--data", ".", "--out", "o", "--teacher", "t"), "train"),
        (("early-exit", "--model", "m", "--data", "."), "train"),
        (("evaluate", "--data", ".", "--out", "o"), "eval"),
        (("calibrate", "--data", "."), "local,eval"),
    ],
)
def test_without_its_extra_a_command_says_so_in_a_line(command, extra):
    code = (
        "import sys; sys.modules |= dict.fromkeys(('torch', 'numpy', 'bm25s', 'transformers'))\n"
        f"sys.argv = ['mistral-rerank', *{command!r}]\n"
        "from mistral_rerank.cli import main; main()"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert process.stderr.endswith(f" is not installed; install it with: pip install 'mistral-rerank[{extra}]'\n")
    assert len(process.stderr.splitlines()) == 1


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_without_what_the_report_needs_an_evaluation_ends_before_it_starts(missing, tmp_path):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        f"sys.argv = ['mistral-rerank', 'evaluate', '--data', '.', '--out', {str(tmp_path / 'out')!r}]\n"
        "from mistral_rerank.cli import main; main()"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert process.stderr == (
        f"mistral-rerank: {missing} is not installed; install it with: pip install 'mistral-rerank[eval]'\n"
    )
    assert not list(tmp_path.iterdir())


def test_every_public_name_exists():
    import mistral_rerank

    assert all(hasattr(mistral_rerank, name) for name in mistral_rerank.__all__)
    with pytest.raises(AttributeError):
        _ = mistral_rerank.nonsense
