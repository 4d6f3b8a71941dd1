"""Finding modules by name, the classifier of a model that no adapter knows, and the width at a point."""

import subprocess
import sys
from collections.abc import Callable

import pytest
from torch import nn

from batchformer import BatchFormer, insert
from batchformer.insertion import adapters
from batchformer.insertion.adapters import adapter_of, find_classifier
from batchformer.insertion.locate import find_points, last_linear, width_of
from batchformer.insertion.plan import InsertionPoint


def tower() -> nn.Module:
    return nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 8, 3),
            "blocks": nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(12)),
            "norm": nn.BatchNorm2d(8),
            "head": nn.Linear(8, 3),
        }
    )


def test_wildcards_stand_for_one_part_of_a_name() -> None:
    found = find_points(tower(), "blocks.*", "after")
    assert [str(point) for point in found] == [f"after 'blocks.{i}'" for i in range(12)]
    inner = find_points(tower(), "blocks.*.1", "after")
    assert [point.name for point in inner] == [f"blocks.{i}.1" for i in range(12)]
    assert [point.name for point in find_points(tower(), "blocks.1*", "before")] == [
        "blocks.1",
        "blocks.10",
        "blocks.11",
    ]


def test_a_dot_is_a_dot() -> None:
    with pytest.raises(ValueError, match="nothing matches 'blocks0'"):
        find_points(tower(), "blocks0", "after")


def test_points_come_in_the_order_of_the_model_and_once() -> None:
    found = find_points(tower(), ["head", "blocks.3", "blocks.0", "blocks.3"], "before")
    assert [point.name for point in found] == ["blocks.0", "blocks.3", "head"]


def test_a_module_with_two_names_is_one_point() -> None:
    model = tower()
    model["copy"] = model["head"]
    assert [p.name for p in find_points(model, "copy", "before")] == ["head"]
    assert [p.name for p in find_points(model, ["copy", "head"], "before")] == ["head"]
    assert [p.name for p in find_points(model, "*", "before")] == ["stem", "blocks", "norm", "head"]


def test_no_match_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"nothing matches 'haed'. The nearest names are \['head'"):
        find_points(tower(), "haed", "before")
    with pytest.raises(ValueError, match=r"nothing matches 'blocks.12'. The nearest names are \[.*'blocks.1"):
        find_points(tower(), ["head", "blocks.12"], "before")
    with pytest.raises(ValueError, match=r"nothing matches ''"):
        find_points(tower(), "", "before")
    with pytest.raises(ValueError, match="at least one module name, got none"):
        find_points(tower(), [], "before")


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), "2"),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3), nn.LogSoftmax(-1)), "2"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 3)), "3"),
        (lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 3)), "1"),
        (lambda: nn.Sequential(nn.Linear(8, 24), nn.LayerNorm(8), nn.Linear(8, 3)), "2"),
        (lambda: nn.Sequential(nn.Linear(8, 3)), "0"),
        (tower, "head"),
    ],
)
def test_the_last_linear(build: Callable[[], nn.Module], name: str) -> None:
    assert last_linear(build()) == name
    assert find_classifier(build()).points == (InsertionPoint(name, "before"),)


class Heads(nn.Module):
    def __init__(self, *heads: nn.Module) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.heads = nn.ModuleList(heads)


@pytest.mark.parametrize(
    "heads",
    [
        [nn.Linear(8, 3), nn.Linear(8, 5)],
        [nn.Linear(8, 3), nn.Linear(8, 3), nn.Linear(8, 3)],
        [nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), nn.Linear(8, 5)],
        [
            nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)),
            nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)),
        ],
    ],
    ids=["two", "three", "deep and flat", "two deep ones"],
)
def test_several_heads_raise_with_the_candidates(heads: list[nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"there may be several heads.*before=\.\.\. with one of \['trunk', 'heads.0"):
        find_classifier(Heads(*heads))


class Parts(nn.Module):
    """Modules as attributes: nothing says in which order they run."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


@pytest.mark.parametrize(
    "model",
    [
        Parts(b=nn.Linear(4, 8), h1=nn.Linear(8, 8), h2=nn.Linear(8, 8)),
        Parts(b=nn.Linear(4, 8), h1=nn.Linear(8, 8), h2=nn.Linear(8, 3)),
        Parts(b=nn.Conv2d(3, 8, 3), h1=nn.Linear(8, 8), h2=nn.Linear(8, 8), h3=nn.Linear(8, 8)),
        Heads(nn.Linear(8, 8), nn.Linear(8, 8)),
        Heads(*(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3)) for _ in range(2))),
        Heads(*(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2))),
        Parts(b=nn.Linear(4, 8), coarse=nn.Linear(8, 5), norm=nn.LayerNorm(8), fine=nn.Linear(8, 3)),
        # A hidden layer, or a coarse head with as many classes as channels.
        Parts(b=nn.Linear(4, 8), stem=nn.Linear(8, 8), norm=nn.LayerNorm(8), head=nn.Linear(8, 3)),
        Parts(images=nn.Linear(512, 10), texts=nn.Linear(256, 10)),
        Parts(b=nn.Linear(4, 8), heads=Parts(h1=nn.Linear(8, 8), h2=nn.Linear(8, 8))),
    ],
)
def test_heads_that_could_be_a_chain_raise_with_the_candidates(model: nn.Module) -> None:
    with pytest.raises(
        ValueError, match=r"may stand beside .*there may be several heads.*before=\.\.\. with one of \["
    ):
        find_classifier(model)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)), "2"),
        (Parts(fc1=nn.Linear(256, 120), fc2=nn.Linear(120, 84), fc3=nn.Linear(84, 10)), "fc3"),
        (Parts(body=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8)), head=nn.Linear(8, 3)), "head"),
        (Parts(stem=nn.Conv2d(3, 8, 3), mlp=nn.Linear(8, 16), norm=nn.LayerNorm(16), head=nn.Linear(16, 3)), "head"),
        (
            Parts(
                blocks=nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(3)),
                head=nn.Linear(8, 3),
            ),
            "head",
        ),
        (Parts(b=nn.Linear(4, 8), mix=BatchFormer(8), head=nn.Linear(8, 3)), "head"),
        (Parts(b=nn.Linear(4, 8), head=nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))), "head.2"),
        (nn.Linear(4, 3), ""),
    ],
)
def test_what_can_only_be_a_chain_is_one(model: nn.Module, name: str) -> None:
    assert last_linear(model) == name


def test_a_head_that_a_library_names_may_have_hidden_layers() -> None:
    model = Parts(body=nn.Linear(4, 8), head=Parts(dense=nn.Linear(8, 8), out=nn.Linear(8, 3)))
    assert last_linear(model, model.head) == "head.out"
    with pytest.raises(ValueError, match="'head.dense' may stand beside 'head.out'"):
        last_linear(model)
    model = Parts(body=nn.Linear(4, 8), fc=Parts(coarse=nn.Linear(8, 5), fine=nn.Linear(8, 3)))
    with pytest.raises(ValueError, match="'fc.coarse' may stand beside 'fc.fine'"):
        last_linear(model, model.fc)
    pooling = Parts(query=nn.Linear(8, 4), key=nn.Linear(8, 4), value=nn.Linear(8, 4), out=nn.Linear(4, 8))
    with pytest.raises(ValueError, match="'query', 'key' may stand beside 'out'"):
        last_linear(pooling, pooling)


def test_without_any_linear_other_places_are_named() -> None:
    with pytest.raises(ValueError, match=r"It has no Linear. Name another module, .* out of \['conv', 'norm'\]\.$"):
        find_classifier(Parts(conv=nn.Conv2d(3, 8, 3), act=nn.ReLU(), norm=nn.BatchNorm2d(8)))


def test_no_linear_at_the_end_raises_with_the_candidates() -> None:
    with pytest.raises(ValueError, match=r"last module with parameters is '1', which is no Linear.*one of \['0'\]"):
        find_classifier(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))
    with pytest.raises(ValueError, match="no module has parameters"):
        find_classifier(nn.Sequential(nn.ReLU()))


def test_an_inserted_module_is_no_candidate() -> None:
    model = Heads(nn.Linear(8, 3))
    insert(model, before="auto")
    assert last_linear(model) == "heads.0"


class Offers(Heads):
    def get_classifier(self) -> object:
        return self.offer(self)

    def offer(self, _: nn.Module) -> object:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("offer", "names"),
    [
        (lambda model: model.heads[1], ["heads.1"]),
        (lambda model: tuple(model.heads), ["heads.0", "heads.1"]),
        (lambda model: [model.heads[1], model.heads[0]], ["heads.1", "heads.0"]),
        (lambda model: model.heads, ["heads.0", "heads.1"]),
        (lambda model: (model.heads, [model.trunk]), ["heads.0", "heads.1", "trunk"]),
    ],
    ids=["module", "tuple", "list", "module list", "nested"],
)
def test_a_model_may_offer_its_classifiers(offer: Callable[[nn.Module], object], names: list[str]) -> None:
    model = Offers(nn.Linear(8, 3), nn.Linear(8, 3))
    model.offer = offer
    assert [point.name for point in find_classifier(model).points] == names


def test_an_offer_that_is_not_there_raises() -> None:
    model = Offers(nn.Linear(8, 3))
    model.offer = lambda _: nn.Identity()
    with pytest.raises(ValueError, match=r"its classifier has no parameters \(class Identity\).*'heads.0'"):
        find_classifier(model)
    model.offer = lambda _: nn.Linear(8, 3)
    with pytest.raises(ValueError, match="that is not inside it"):
        find_classifier(model)


@pytest.mark.parametrize(
    ("module", "before", "after"),
    [
        (nn.Linear(4, 6), 4, 6),
        (nn.Conv2d(4, 6, 1), 4, 6),
        (nn.BatchNorm2d(4), 4, 4),
        (nn.LayerNorm((7, 4)), 4, 4),
        (nn.Sequential(nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 6), nn.PReLU()), 4, 6),
        (nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 6)), 4, 6),
    ],
)
def test_width(module: nn.Module, before: int, after: int) -> None:
    model = nn.ModuleDict({"part": module})
    assert width_of(model, InsertionPoint("part", "before")) == before
    assert width_of(model, InsertionPoint("part", "after")) == after


def test_a_width_that_no_module_tells() -> None:
    with pytest.raises(ValueError, match=r"read the width after '0' from the model.*Pass dim="):
        width_of(nn.Sequential(nn.ReLU()), InsertionPoint("0", "after"))


def test_adapters_load_only_with_their_library() -> None:
    assert adapter_of(nn.Linear(1, 1)) is None
    assert adapter_of(BatchFormer(4)) is None
    program = (
        "import sys, torch, batchformer; model = torch.nn.Sequential(torch.nn.Linear(4, 3)); "
        "batchformer.insert(model, before='auto'); "
        "sys.exit(any(name in sys.modules for name in ('timm', 'torchvision', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_class_derived_from_a_librarys_class_has_its_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "ADAPTERS", {"torch": "batchformer.insertion.locate"})
    assert adapter_of(Heads()) is sys.modules["batchformer.insertion.locate"]
