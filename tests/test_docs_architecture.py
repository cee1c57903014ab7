"""The page on architecture: it lists every module, names files that exist, and its way of a pair is the one traced."""

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location

from .processes import ROOT, start_script


PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
SCRIPT = ROOT / "tools/pair_way.py"
MOST_MODULES_ON_THE_WAY = 30


def modules_of(folder: str) -> set[str]:
    """Modules below a folder of the package; a package's `__init__.py` counts where it defines something."""
    paths = (ROOT / "trl_dt2it" / folder).rglob("*.py") if folder else (ROOT / "trl_dt2it").glob("*.py")
    defining = [path for path in paths if path.name != "__init__.py" or path.parent.name in ("sources", "benchmarks")]
    return {str(path.relative_to(ROOT / "trl_dt2it" / folder)) for path in defining}


def test_every_module_has_its_line():
    sections = dict(re.findall(r"^### `([\w/]+)/`.*?\n(.*?)(?=^##)", PAGE, flags=re.M | re.S))
    folders = {path.parent.name for path in (ROOT / "trl_dt2it").glob("*/__init__.py")}
    assert set(sections) == {"trl_dt2it", *folders}
    for folder, text in sections.items():
        cells = re.findall(r"^\| (`.*?) \|", text, flags=re.M)
        listed = [name for cell in cells for name in re.findall(r"`([\w/]+\.py)`", cell)]
        assert sorted(listed) == sorted(modules_of("" if folder == "trl_dt2it" else folder)), folder


def test_the_files_that_the_page_names_are_there():
    named = set(re.findall(r"`((?:trl_dt2it|tests|tools|recipes|docs)/[\w/.]*)`", PAGE))
    assert len(named) > 15
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_layers_are_those_that_are_checked():
    contract = re.search(r"^layers = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), flags=re.M | re.S)
    (shown,) = re.findall(r"^```text\n(cli .*?)\n```$", PAGE, flags=re.M | re.S)
    assert re.split(r"\s+─► ", shown) == [line.replace(" : ", ", ") for line in re.findall(r'"(.+)"', contract[1])]


def test_the_way_of_a_pair_is_what_is_traced():
    spec = spec_from_file_location("pair_way", SCRIPT)
    pair_way = module_from_spec(spec)
    sys.modules[spec.name] = pair_way
    spec.loader.exec_module(pair_way)
    lines = start_script(SCRIPT).finish().splitlines()
    modules = [line for line in lines if re.fullmatch(r"[\w/]+\.py", line)]
    assert lines[-1] == f"{len(modules)} modules"
    assert pair_way.LISTING.findall(PAGE) == [pair_way.as_text(modules)], "run `python tools/pair_way.py --write`"
    assert {"data/rows.py", "training/trainer.py", "curation/ledger.py", "curation/rules.py"} <= set(modules)
    assert len(modules) <= MOST_MODULES_ON_THE_WAY
