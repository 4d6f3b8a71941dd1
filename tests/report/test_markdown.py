"""Text out of the data stands in a report letter by letter, whatever it holds."""

import re

import pytest

from batchformer.report import Table, comparison_text, read_comparison, to_markdown, write_report
from batchformer.report.markdown import escape_markdown
from batchformer.report.plots import plot_classes

HOSTILE = (
    "<script>alert(1)</script>",
    "a|b||c",
    "`code` ```",
    "two\nlines\r\n# three",
    "[link](http://x)",
    "![image](x.png)",
    "[ref]: http://x",
    "*bold* **x**",
    "_under_ __init__ self_only",
    "~~gone~~",
    "&amp; &#35; & co",
    "\\| \\",
    "# head",
    "- item",
    "1. first",
    "> quote",
    "---",
    "$x$ and $y$",
    "\x1b[31mred\x07",
    "größe 日本",
    "{{ 7 * 7 }} {% if %}",
)
PLAIN = [" ".join(name.split()).replace("\x1b", "\ufffd").replace("\x07", "\ufffd") for name in HOSTILE]


@pytest.fixture
def hostile(folders, tmp_path):
    """A comparison whose recipe, classes, notes, settings and pictures have such names."""
    recipe = "re|ci`pe_ <b>"
    result = {"notes": [f"Note {name}" for name in HOSTILE], "class_count": "training |images|"}
    folder = folders.comparison(
        tmp_path / "c m(p)<1>",
        seeds=(0,),
        recipe=recipe,
        result=result,
        names=HOSTILE,
        counts=range(len(HOSTILE), 0, -1),
    )
    for arm in ("plain", "batchformer"):
        pictures = folder / arm / "seed0" / "pictures"
        pictures.mkdir()
        (pictures / "a b|c](x)<i>.png").touch()
    return folder


@pytest.mark.parametrize("text", HOSTILE)
def test_a_cell_stays_a_cell(text):
    line = to_markdown(Table("t", ("class", "n"), ((text, "1"),))).splitlines()[2]
    assert len(re.split(r"(?<!\\)(?:\\\\)*\|", line)) == 4
    assert not re.search(r"<|(?<!\\)`|[\x00-\x1f]", line)


def test_words_and_numbers_stay_legible():
    for text in (
        "self_only",
        "[+1.72, +3.08]",
        "-10.00",
        "T-shirt/top",
        "95 % interval",
        "3 of 5",
        "a & b",
        "+BatchFormer",
    ):
        assert escape_markdown(text) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_a_reader_of_markdown_gives_the_text_back(text):
    reader = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False, "html": True})
    plain = PLAIN[HOSTILE.index(text)]
    for source in (f"- {escape_markdown(text)}\n", f"{escape_markdown(text)}\n", f"## {escape_markdown(text)}\n"):
        kinds = [token.type for token in reader.parse(source)]
        (inline,) = (token for token in reader.parse(source) if token.type == "inline")
        assert "".join(child.content for child in inline.children) == plain
        assert {child.type for child in inline.children} <= {"text", "text_special"}
        assert len(kinds) in (3, 7)  # one paragraph or heading, or one item of one list


def test_a_report_of_hostile_names_reads_as_they_are(hostile, tmp_path):
    reader = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False, "html": True})
    paths = write_report([hostile], tmp_path / "out")
    assert paths.notes == ("classes.png has boxes for letters that its font lacks; the tables have the letters.",)
    tokens = reader.parse(paths.report.read_text(encoding="utf-8"))
    children = [child for token in tokens for child in token.children or ()]
    assert not [
        token for token in (*tokens, *children) if token.type.startswith(("html", "link", "em_", "strong_", "s_"))
    ]
    texts = ["".join(child.content for child in token.children) for token in tokens if token.type == "inline"]
    assert [text for text in texts if text in PLAIN] == PLAIN  # the table of classes
    assert {f"Note: Note {name}" for name in PLAIN} <= set(texts)
    assert "re|ci`pe_ <b>" in texts
    images = [child.attrs["src"] for child in children if child.type == "image"]
    pictures = [source for source in images if "pictures" in source]
    assert pictures[0] == "../c%20m%28p%29%3C1%3E/plain/seed0/pictures/a%20b%7Cc%5D%28x%29%3Ci%3E.png"
    # No blank lines pile up, and none is missing in front of a heading or a table.
    text = paths.report.read_text(encoding="utf-8")
    assert "\n\n\n" not in text
    assert re.findall(r"[^\n]\n(?:#|\| \w)", re.sub(r"(\n\|[^\n]*)+", "\n\n", text)) == []


def test_the_terminal_gets_no_control_characters(hostile):
    text = comparison_text(read_comparison(hostile))
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)


def test_pictures_take_names_for_no_formulas(hostile, tmp_path):
    pytest.importorskip("matplotlib")
    fig, _ = plot_classes(read_comparison(hostile))
    labels = [label.get_text() for label in fig.axes[1].get_xticklabels()]
    assert r"\$x\$ and \$y\$" in labels


def test_without_jinja_it_is_named(monkeypatch):
    from batchformer.report import markdown

    markdown._environment.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(ImportError, match="pip install jinja2"):
        to_markdown(Table("t", ("a",), ()))
    markdown._environment.cache_clear()
