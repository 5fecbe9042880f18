"""The form of the code: budgets, what lives where, and blocks that scripts share."""

import ast
import difflib
import inspect
import re
from pathlib import Path

import pytest

import blpo_continuous
import blpo_discrete
import ppo_continuous
import ppo_discrete
import sobirl_continuous
import sobirl_discrete

ROOT = Path(__file__).parent.parent
BUDGETS = {ppo_continuous: 360, ppo_discrete: 360, blpo_continuous: 470, blpo_discrete: 470}
BUDGETS |= {sobirl_continuous: 560, sobirl_discrete: 560}
LONGEST = {sobirl_continuous: 130, sobirl_discrete: 130}  # lines of train(), 110 in the others
TWINS = [(ppo_continuous, blpo_continuous), (ppo_discrete, blpo_discrete)]
ACTION_TWINS = [(ppo_continuous, ppo_discrete), (blpo_continuous, blpo_discrete)]


# What the scripts of a pair have in common by name, and not by content
DIFFERENT = {pair: {"Args", "check_args", "Batch", "make_batch", "minibatches", "train"} for pair in TWINS}
DIFFERENT |= {pair: {"Args", "Actor", "Batch", "train"} for pair in ACTION_TWINS}
LEADERS = (sobirl_continuous, sobirl_discrete)
DIFFERENT[LEADERS] = {"Args", "check_args", "Actor", "Critic", "train", "second_term", "log_probs_of"}
DIFFERENT[LEADERS] |= {"soft_value", "critic_gradient", "actor_gradient", "rival_gradient"}
SAME = {"gae_matrix", "gae", "policy_loss", "critic_loss", "with_next", "standardized"}
SAME_OF_LEADERS = {"mlp", "Temperature", "temperature_gradient", "penalty_term", "train_reward"}


def source_of(script, name="train"):
    return inspect.getsource(getattr(script, name)).splitlines()


def changed_lines(first: list[str], second: list[str]) -> list[str]:
    """What `diff` would print of two texts, without the lines that say where."""
    return [line for line in difflib.ndiff(first, second) if line[0] in "+-"]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def words(module: ast.Module) -> set[str]:
    """Names of variables, attributes and imported modules."""
    found = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
    return found


@pytest.mark.parametrize("script", BUDGETS, ids=lambda script: script.__name__)
def test_scripts_keep_their_budgets(script):
    assert len(Path(script.__file__).read_text(encoding="utf-8").splitlines()) <= BUDGETS[script]
    assert len(source_of(script)) <= LONGEST.get(script, 110)
    module = tree(Path(script.__file__))
    assert not [node for node in ast.walk(module) if isinstance(node, (ast.Try, ast.Lambda))]
    assert not words(module) & {"os", "sys", "signal", "contextlib"}


def test_lines_are_short():
    paths = [path for kind in ("*.py", "*.sh") for path in ROOT.rglob(kind)]
    paths = [path for path in paths if not {".venv", "runs"} & set(path.relative_to(ROOT).parts)]
    assert len(paths) > 25
    long = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if len(line) > 110:
                long.append(f"{path.relative_to(ROOT)}:{number}")
    assert not long


def test_prose_is_short_too():
    """Of Markdown all but tables, commands and single links, which cannot be broken."""
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        inside = False
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            inside ^= line.startswith("```")
            if not inside and not line.startswith("|") and " " in line.strip():
                assert len(line) <= 110, f"{path.name}:{number}"


PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def anchors(page):
    """As GitHub makes them of the headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """To files, and to headings in them; pictures are small, and described for those who cannot see them."""
    text = page.read_text(encoding="utf-8")
    for image, name, target in re.findall(r"(!?)\[([^]]*)\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        assert not heading or heading in anchors(found.read_text(encoding="utf-8")), target
        limit = 2_000_000 if found.suffix == ".gif" else 300_000
        assert not image or (len(name) > 10 and found.stat().st_size < limit), target


def test_pages_are_found_and_the_first_one_is_short():
    readme = PAGES[0].read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 140
    assert all(f"(docs/{page.name})" in readme for page in PAGES[1:])


def test_tests_that_pages_name_exist():
    every = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    for page in PAGES:
        for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")):
            assert f"def {name}(" in every or (ROOT / "tests" / f"{name}.py").exists(), (page.name, name)


def test_support_does_not_learn():
    scripts = {path.stem for path in ROOT.glob("*.py")}
    assert {"blpo_continuous", "sobirl_tabular", "nystrom"} <= scripts
    for path in (ROOT / "support").glob("*.py"):
        found = words(tree(path))
        assert not found & scripts, path
        assert not found & {"autograd", "backward", "optim", "grad", "requires_grad_"}, path


@pytest.mark.parametrize("first, second", DIFFERENT, ids=lambda script: script.__name__)
def test_what_scripts_share_is_identical(first, second):
    """Functions and classes of the same name, but for the short list of what the scripts are about."""
    differ = DIFFERENT[first, second]

    def defined(script):
        kinds = (ast.FunctionDef, ast.ClassDef)
        return {node.name for node in tree(Path(script.__file__)).body if isinstance(node, kinds)}

    shared = (defined(first) & defined(second)) - differ
    expected = SAME_OF_LEADERS if (first, second) == LEADERS else SAME
    assert expected | {"main"} <= shared
    for name in shared:
        assert source_of(first, name) == source_of(second, name), name
    for name in differ:
        assert source_of(first, name) != source_of(second, name), f"{name} need not be on the list"


@pytest.mark.parametrize("ppo, blpo", TWINS, ids=lambda script: script.__name__)
def test_the_diff_is_the_method(ppo, blpo):
    """How many lines of train() differ, and that what BLPO adds is marked."""
    assert len(changed_lines(source_of(ppo), source_of(blpo))) <= 45
    texts = [Path(script.__file__).read_text(encoding="utf-8").split('"""', 2)[2] for script in (ppo, blpo)]
    assert "BLPO:" not in texts[0]
    first, second = (text.splitlines() for text in texts)
    for kind, _, _, begin, end in difflib.SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
        block = [line for line in second[begin:end] if line.strip()]
        if kind == "insert" and block:
            assert any("# BLPO:" in line for line in [*block, *second[max(0, begin - 2) : begin]]), block


@pytest.mark.parametrize("continuous, discrete", ACTION_TWINS, ids=lambda script: script.__name__)
def test_kinds_of_actions_differ_in_the_policy(continuous, discrete):
    assert len(changed_lines(source_of(continuous), source_of(discrete))) <= 4


def test_leaders_of_both_kinds_of_actions_differ_in_the_policy():
    """How many lines of train() do, and which flags: those that the other kind of action has no use for."""
    continuous, discrete = LEADERS
    assert len(changed_lines(source_of(continuous), source_of(discrete))) <= 100
    flags = [script.Args.__dataclass_fields__.keys() for script in LEADERS]
    assert flags[0] - flags[1] == {"policy_frequency", "hyper_actions"}
    assert flags[1] - flags[0] == {"update_frequency", "target_frequency", "target_entropy"}
    for name in ("METRICS", "PHASES", "LEADER", "HYPER"):
        assert getattr(continuous, name) == getattr(discrete, name)
