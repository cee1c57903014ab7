"""Content of the site beyond its pages: every benchmark table, the API from the stubs, and no link that leads nowhere.

MkDocs calls the functions named `on_...` (see `hooks` in mkdocs.yml). Tables and names are read at each build, so that
no page can say something else than the repository does.
"""

import re
from importlib import import_module
from pathlib import Path

from mkdocs.structure.files import File


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RESULTS_MARKER = "<!-- every table of benchmarks/results -->"
HEADS_MARKER = re.compile(r"<!-- heads of (recipes/\w+) -->")
NAMES_MARKER = re.compile(r"<!-- names of ([\w.]+) -->")


def benchmarks() -> list[tuple[str, str, list[str]]]:
    """The rows of the table of benchmarks/README.md: script, question and the names of its results."""
    rows = []
    for line in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `") and len(cells) == 3:
            names = re.findall(r"\(results/(\w+)\.md\)", cells[2])
            rows += [(script, cells[1], names) for script in re.findall(r"`([\w/]+\.py)`", cells[0])]
    return rows


def command_of(result: str) -> tuple[str, str]:
    """The command that makes a table, and the question that it answers."""
    found = [row for row in benchmarks() if result in row[2]]
    if not found:
        raise ValueError(f"benchmarks/README.md has no row for results/{result}.md; add one.")
    script, question, _ = next((row for row in found if Path(row[0]).stem == result), found[0])
    peers = script.startswith("peers/")
    return "make bench-peers WORKDIR=path" if peers else f"python benchmarks/{script}", question


def all_results() -> str:
    """Every table of benchmarks/results, each under its question and its command."""
    listed = [name for _, _, names in benchmarks() for name in names]
    present = sorted(RESULTS.glob("*.md"), key=lambda path: [*listed, path.stem].index(path.stem))
    parts = []
    for path in present:
        command, question = command_of(path.stem)
        content = re.sub(r"^#+ .*\n+", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE).strip()
        content = content.replace("](", "](results/")
        title = path.stem.replace("_", " ")
        heading = f"## {title[0].upper()}{title[1:]} {{ #{path.stem} }}"
        parts.append(f"{heading}\n\n{question}\n\n```bash\n{command}\n```\n\n{content}")
    return "\n\n".join(parts)


def head_of(path: str) -> str:
    """The comment at the top of a YAML file."""
    lines = []
    for line in (ROOT / path).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[2:])
    return "```text\n" + "\n".join(lines).strip() + "\n```"


def heads_of(folder: str) -> str:
    """The heads of all YAML files of a folder, each under its name."""
    paths = sorted((ROOT / folder).glob("*.yaml"))
    return "\n\n".join(
        f"### {path.stem}\n\n`{folder}/{path.name}`\n\n{head_of(f'{folder}/{path.name}')}" for path in paths
    )


def names_of(package: str) -> str:
    """A directive of mkdocstrings for each public name of a package, at the module that defines it."""
    stub = Path(import_module(package).__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    homes = {name: module for module, name in re.findall(r"^from \.([\w.]+) import (\w+)", stub, flags=re.MULTILINE)}
    return "\n\n".join(f"::: {package}.{homes[name]}.{name}" for name in sorted(homes, key=str.lower))


def with_links(text: str, source: str) -> str:
    """Turn links out of docs/ into links to tables of the site, or into plain names of files in the repository."""
    depth = source.count("/")
    up = "../" * depth

    def change(match: re.Match) -> str:
        label, target = match[1], match[2]
        table = re.fullmatch(rf"{re.escape(up)}\.\./benchmarks/results/(\w+)\.md", target)
        if table:
            return f"[{label}]({up}measured.md#{table[1]})"
        return label if target.startswith(f"{up}../") else match[0]

    return re.sub(r"\[([^\]\n]+)\]\(([^)\s]+)\)", change, text)


def on_page_markdown(markdown: str, page, **_) -> str:
    """Fill in tables, heads and names from the repository, and rewrite links."""
    text = with_links(markdown, page.file.src_uri)
    text = HEADS_MARKER.sub(lambda match: heads_of(match[1]), text)
    text = NAMES_MARKER.sub(lambda match: names_of(match[1]), text)
    return text.replace(RESULTS_MARKER, all_results()) if RESULTS_MARKER in text else text


def on_files(files, config, **_):
    """Add the pictures beside the tables."""
    for path in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files
