"""The commands of README and docs: each block says who runs it, and these tests run those that no other test runs.

The line before a block of commands is one of

- `<!-- run -->`: runs here, in a folder that looks like a clone, without a server
- `<!-- run with a stack -->`: the same, while the released model is served
- `<!-- run with two versions -->`: the same with versions 1.0.0 (served) and 1.0.1 (in the model store); takes minutes
- `<!-- run with a server of its own -->`: `gradserve serve` among them runs in the background; takes minutes
- `<!-- run by tests/… -->`: the test named there runs it
- `<!-- not run: REASON -->`

Blocks of one page run in order, as one shell session.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

from control.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
GENERATED = {"docs/reference/cli.md", "docs/reference/http.md"}
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "model_store/README.md",
        *ROOT.glob("docs/**/*.md"),
    )
    if str(path.relative_to(ROOT)) not in GENERATED
)
BLOCK = re.compile(
    r"(?:^ *(?P<mark><!-- [^\n]* -->)\n\s*)?^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
MARK = re.compile(r"<!-- (?:(run(?: with .*)?)|run by (?P<test>tests/\S+)|not run: (?P<reason>.{10,})) -->")
RUN, STACK, TWO_VERSIONS = "<!-- run -->", "<!-- run with a stack -->", "<!-- run with two versions -->"
OWN_SERVER = "<!-- run with a server of its own -->"
# In place of `gradserve serve …`, which runs until Ctrl-C.
IN_BACKGROUND = """\
{command} > serve.log 2>&1 & server=$!
trap 'kill -TERM $server; wait $server' EXIT
until grep -q ready: serve.log; do kill -0 $server || {{ cat serve.log; exit 1; }}; sleep 0.5; done
"""
COMMAND = re.compile(
    r"^\s*(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\S*/)?(make|gradserve|docker|curl|python|git|torchrun|pip|gunicorn|openssl) ",
    re.MULTILINE,
)
GRADSERVE = re.compile(
    r"(?:`|^ *\$ (?:[A-Z_]+=\S+ )*)(?:\.venv/bin/)?gradserve ((?:[a-z]+ ?)+)([^`\n#|]*)", re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """A fenced block with the comment before it."""

    mark: str
    language: str
    code: str

    def script(self) -> str:
        """Return the block as lines of a shell script."""
        if self.language == "python":
            return f"python - <<'END_OF_PYTHON'\n{self.code}END_OF_PYTHON\n"
        lines, goes_on = [], False
        for line in self.code.splitlines():
            if goes_on or line.startswith("$ "):
                lines.append(line.removeprefix("$ "))
                goes_on = line.endswith("\\")
        return "\n".join(lines) + "\n"


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(found["mark"] or "", found["language"], found["code"]) for found in BLOCK.finditer(text)]


def pages_with(mark: str) -> list[str]:
    return [page for page in PAGES if any(block.mark == mark for block in blocks(page))]


@pytest.fixture
def clone(tmp_path):
    """A folder that looks like a clone after `make install`, with nothing of the real one to write to."""
    folder = tmp_path / "gradserve"
    (folder / "model_store").mkdir(parents=True)
    (folder / "model_store" / "released").symlink_to(ROOT / "model_store" / "released")
    for name in subprocess.check_output(["git", "ls-tree", "--name-only", "HEAD"], cwd=ROOT, text=True).split():
        if name != "model_store":
            (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(Path(sys.prefix))
    return folder


def script_of(page: str, mark: str) -> str:
    return "".join(block.script() for block in blocks(page) if block.mark == mark)


def run(script: str, clone: Path, **environment: str) -> str:
    """Run the script in the clone; return what it printed."""
    (clone.parent / ".curlrc").write_text("fail\nsilent\nshow-error\n")  # an error of the gateway is an error here
    foreign = ("AGENT_", "GATEWAY_", "GRADSERVE_", "MLFLOW")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    inherited |= {"PATH": f"{clone}/.venv/bin:{os.environ['PATH']}", "CURL_HOME": str(clone.parent)} | environment
    done = subprocess.run(
        ["timeout", "--kill-after", "60", "540", "bash", "-euxo", "pipefail", "-c", script],  # ends the server too
        cwd=clone, env=inherited, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_commands_says_who_runs_it(page):
    for block in blocks(page):
        if block.language in {"console", "python"}:
            mark = MARK.fullmatch(block.mark)
            assert mark, f"{page}: write `<!-- run -->`, `<!-- not run: REASON -->` … before\n{block.code}"
            assert not mark[1] or block.mark in {RUN, STACK, TWO_VERSIONS, OWN_SERVER}, f"{page}: {block.mark}"
            if mark["test"]:
                test = ROOT / mark["test"]
                assert test.is_file(), f"{page} names {test}"
                assert Path(page).name in test.read_text(encoding="utf-8"), f"{test} does not read {page}"
        else:
            assert not COMMAND.search(block.code), f"{page}: these commands need ```console and `$ `\n{block.code}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_of_gradserve_exist(page):
    """Also those that are not run, and those in sentences."""
    for words, rest in GRADSERVE.findall((ROOT / page).read_text(encoding="utf-8")):
        command = typer.main.get_command(app)
        for word in words.split():
            if not hasattr(command, "commands"):
                break
            assert word in command.commands, f"{page}: there is no `gradserve {words}`"
            command = command.commands[word]
        options = {name for option in command.params for name in option.opts + option.secondary_opts} | {"--help"}
        for option in re.findall(r"(?<=\s)--[a-z-]+", f" {rest}"):
            assert option in options, f"{page}: `gradserve {words}` has no option {option}"


@pytest.mark.parametrize("page", PAGES)
def test_targets_of_make_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for target in re.findall(r"(?:`|^\$ |&& )(?:[A-Z_]+=\S+ )*make ([a-z-]+)", (ROOT / page).read_text(), re.MULTILINE):
        assert target in targets, f"{page} names `make {target}`"


@pytest.mark.parametrize("page", pages_with(RUN))
def test_commands_without_a_server_work_as_written(page, clone):
    run(script_of(page, RUN), clone)


@pytest.mark.server
@pytest.mark.parametrize("page", pages_with(STACK))
def test_commands_beside_a_running_gateway_work_as_written(page, clone, stack):
    script = script_of(page, STACK).replace("localhost:8000", stack.gateway.removeprefix("http://"))
    run(script, clone, **of_stack(stack))


@pytest.mark.long
@pytest.mark.server
def test_commands_that_move_versions_work_as_written(clone, make_stack, pack_again):
    """The pages share the stack, in the order of their names: canary, roll back, sign archives."""
    stack = make_stack(AGENT_MODEL_STORE=str(clone / "model_store"))
    stack.start(served_as("1.0.0", clone.parent / "source"))
    stack.wait_until_ready()
    archive = pack_again("1.0.1")
    for file in (archive, archive.with_name(f"{archive.name}.sha256")):
        shutil.copy(file, clone / "model_store")
    for page in pages_with(TWO_VERSIONS):
        run(script_of(page, TWO_VERSIONS), clone, **of_stack(stack))


@pytest.mark.long
@pytest.mark.server
@pytest.mark.parametrize("page", pages_with(OWN_SERVER))
def test_commands_with_a_server_of_their_own_work_as_written(page, clone):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        script = script_of(page, OWN_SERVER).replace("8001", str(free.getsockname()[1]))
    serve = re.compile(r"^(\S*gradserve serve .*?)(?: +#.*)?$", re.MULTILINE)
    shown = run(serve.sub(lambda found: IN_BACKGROUND.format(command=found[1]), script), clone)
    assert '"version":"1.1.0"' in shown


def of_stack(stack) -> dict[str, str]:
    return {
        name: value
        for name, value in stack.environment.items()
        if name.startswith(("AGENT_", "GATEWAY_", "GRADSERVE_"))
    }


def served_as(version: str, folder: Path) -> Path:
    """Return a copy of the released model with another version."""
    shutil.copytree(ROOT / "model_store" / "released", folder)
    contract = (folder / "contract.json").read_text(encoding="utf-8")
    renamed = re.sub(r'("version": )"[^"]*"', rf'\1"{version}"', contract, count=1)
    (folder / "contract.json").write_text(renamed, encoding="utf-8")
    return folder
