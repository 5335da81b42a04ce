"""Every mistake in a configuration is reported at once."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from data_prep.dataset import settings
from data_prep.dataset.settings import SettingsError, group, setting


@dataclass(frozen=True)
class Item:
    name: str = setting("", "a name")
    sizes: list[int] = setting([], "sizes", low=1)

    def problems(self) -> list[str]:
        return [] if self.name else ["name: not set"]


@dataclass(frozen=True)
class Inner:
    rate: float = setting(0.5, "a share", low=0.0, high=1.0)
    kind: Literal["a", "b", 3] = setting("a", "a choice")
    limit: int = setting(5, "a limit", low=0)
    most: float | None = setting(2.0, "the most; none: any")


@dataclass(frozen=True)
class Outer:
    count: int = setting(4, "how many", low=1)
    enabled: bool = setting(False, "whether")
    label: str = setting("x", "a label")
    inner: Inner = group(Inner)
    items: list[Item] = setting([], "items")

    def problems(self) -> list[str]:
        return ["count: 13 brings bad luck"] if self.count == 13 else []


@dataclass(frozen=True)
class Two:
    one: Inner = group(Inner)
    other: Outer = group(Outer)


def problems_of(overrides: list[str], path: Path | None = None) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        settings.load(Outer, path, overrides)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def test_defaults_then_the_file_then_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("count: 5\ninner: {rate: 0.25}\nitems: [{name: one, sizes: [1, 2]}]\n")
    assert settings.load(Outer, None) == Outer()
    loaded = settings.load(Outer, path, ["count=6", "inner.kind=b", "inner.limit=7"])
    assert loaded == Outer(6, False, "x", Inner(0.25, "b", 7), [Item("one", [1, 2])])


def test_a_word_reaches_into_a_list(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("items: [{name: one}, {name: two, sizes: [1]}]\n")
    loaded = settings.load(Outer, path, ["items[1].sizes=[3]", "items[0].sizes=[2]"])
    assert loaded.items == [Item("one", [2]), Item("two", [3])]
    assert settings.load(Outer, path, ["items=[{name: x}]"]).items == [Item("x")]
    assert settings.load(Outer, path, ["inner={rate: 0.1}", "inner.limit=2"]).inner == Inner(
        0.1, "a", 2
    )
    problem = "'items[2].name=x': there is no items[2].name whose value could be set"
    assert problems_of(["items[2].name=x"], path) == [problem]
    problem = "'items.name=x': there is no items.name whose value could be set"
    assert problems_of(["items.name=x"], path) == [problem]


def test_all_mistakes_are_in_one_message(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "cuont: 1\nenabled: 1\nlabel: 3\ninner: {rate: 1.5, kind: c, limit: -1, other: 2}\n"
        "items: [{name: 1, sizes: [0, x]}, 4]\n"
    )
    assert sorted(problems_of(["count=many"], path)) == sorted(
        [
            "cuont: unknown key; did you mean count?",
            "count: expected a whole number, found 'many'",
            "enabled: expected true or false, found 1",
            "label: expected text, found 3",
            "inner.rate: expected 0.0 to 1.0, found 1.5",
            "inner.kind: expected one of a, b, 3; found 'c'",
            "inner.limit: expected at least 0, found -1",
            "inner.other: unknown key; known: rate, kind, limit, most",
            "items[0].name: expected text, found 1",
            "items[0].sizes[0]: expected at least 1, found 0",
            "items[0].sizes[1]: expected a whole number, found 'x'",
            "items[1]: expected keys, found 4",
        ]
    )


def test_a_key_without_the_name_of_its_group_is_found_in_it() -> None:
    assert problems_of(["rate=0.1"]) == ["rate: unknown key; did you mean inner.rate?"]
    assert problems_of(["inner.kind=c", "limit=3"]) == [
        "limit: unknown key; did you mean inner.limit?",
        "inner.kind: expected one of a, b, 3; found 'c'",
    ]
    with pytest.raises(SettingsError) as caught:
        settings.load(Two, None, ["kind=a"])
    assert caught.value.problems == [
        "kind: unknown key; did you mean one.kind or other.inner.kind?"
    ]


@dataclass(frozen=True)
class Motor:
    active: bool = setting(False, "whether it runs")
    speeds: list[int] = setting([], "speeds", low=1)

    def problems(self) -> list[str]:
        if self.active:
            return [] if self.speeds else ["speeds: not set"]
        return ["speeds: has no effect with active=False"] if self.speeds else []


@dataclass(frozen=True)
class Machine:
    motor: Motor = group(Motor)
    motors: list[Motor] = setting([], "more of them")
    lamps: int = setting(0, "how many")

    def problems(self) -> list[str]:
        found = [] if self.lamps else ["lamps: not set"]
        return found if self.motor.active else [*found, "lamps: need motor.active"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["motor.active=maybe", "motor.speeds=[3]"],
            ["motor.active: expected true or", "lamps: not set"],
        ),
        (
            ["motor.actve=true", "motor.speeds=[3]"],
            ["motor.actve: unknown key; did", "lamps: not set"],
        ),
        (["motor.active=true", "motor.speeds=[0]"], ["motor.speeds[0]: expect", "lamps: not set"]),
        (
            [
                "motors=[{active: 3, speeds: [1]}, {speeds: [1]}]",
                "motor.active=true",
                "motor.speeds=[1]",
            ],
            ["motors[0].active: expected", "motors[1].speeds: has no effect", "lamps: not set"],
        ),
        (
            ["motor.active=true", "motor.speeds=[1]", "lampes=3"],
            ["lampes: unknown key; did you mean"],
        ),
        (
            ["need=3"],
            ["need: unknown key; known", "lamps: not set", "lamps: need motor.active"],
        ),
    ],
)
def test_what_follows_from_the_default_of_a_wrong_setting_alone_is_not_told(
    words: list[str], told: list[str]
) -> None:
    with pytest.raises(SettingsError) as raised:
        settings.load(Machine, None, words)
    found = raised.value.problems
    assert len(found) == len(told) and all(map(str.startswith, found, told)), found


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("count=true", "count: expected a whole number, found True"),
        ("count=1.0", "count: expected a whole number, found 1.0"),
        ("count=null", "count: expected a whole number, found None"),
        ("count=0", "count: expected at least 1, found 0"),
        ("enabled=2", "enabled: expected true or false, found 2"),
        ("inner.rate=.nan", "inner.rate: expected a finite number, found nan"),
        ("inner.rate=fast", "inner.rate: expected a number, found 'fast'"),
        ("inner.kind=3.0", "inner.kind: expected one of a, b, 3; found 3.0"),
        ("inner=4", "inner: expected keys, found 4"),
        ("items=one", "items: expected a list, found 'one'"),
        ("count=13", "count: 13 brings bad luck"),
        ("count", "'count': expected key=value, for example count=4"),
        ("--count=3", "'--count=3': expected key=value, for example count=4"),
        ("items=[{sizes: [1]}]", "items[0].name: not set"),
    ],
)
def test_a_wrong_override_is_reported(word: str, problem: str) -> None:
    assert problems_of([word]) == [problem]


def test_an_empty_text_is_no_number_and_a_number_that_may_be_left_out_is_so_in_words() -> None:
    assert settings.load(Outer, None, ["inner.most=null"]).inner.most is None
    assert problems_of(["inner.most=", "inner.limit= ", "items="]) == [
        "inner.limit: expected a whole number, found ''",
        "inner.most: expected a value, or null for none, found ''",
        "items: expected a list, found ''",
    ]
    assert settings.load(Outer, None, ["label="]).label == ""


def test_overrides_are_checked_beside_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    # What the file may hold is not missed: items, keys, and what only the whole would show.
    words = ["cuont=1", "inner.rate=2", "items[0].name=a", "label=${other}", "count=13", "x y"]
    assert problems_of(words, path) == [
        f"{path}: cannot be read (No such file or directory)",
        "'x y': expected key=value, for example count=4",
        "cuont: unknown key; did you mean count?",
        "inner.rate: expected 0.0 to 1.0, found 2.0",
    ]


def test_a_number_without_a_dot_is_a_number() -> None:
    assert settings.load(Outer, None, ["inner.rate=1e-4"]).inner.rate == 1e-4
    assert settings.load(Outer, None, ["inner.rate=1"]).inner.rate == 1.0


def test_other_keys_are_interpolated() -> None:
    words = ["count=7", "label=run-${count}", "inner.limit=${count}"]
    loaded = settings.load(Outer, None, words)
    assert (loaded.label, loaded.inner.limit) == ("run-7", 7)


def test_an_interpolated_key_may_have_its_default(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "label: ${inner.kind}-${count}\nitems: [{name: one}, {name: '${items[0].sizes}'}]"
    )
    (problem,) = problems_of(["inner.limit=${enabled}"], path)[1:]
    assert problem == "items[1].name: expected text, found []"
    loaded = settings.load(Outer, path, ["items[1].name=${items[0].name}", "count=9"])
    assert (loaded.label, loaded.items[1].name) == ("a-9", "one")
    # What nobody has set is still the default, not a setting that was given.
    assert settings.load(Outer, None, ["label=${inner.kind}"]).label == "a"


@pytest.mark.parametrize(
    "text",
    ["runs/try #2", "a: b", "- a", "[a", "{a", "2024", "0.5", "null", "yes", "*a", "&a b", "!a b",
     "%a", "@a", "`a", "|", ">", "?", "a\tb", " a ", "", "'it's'", "a 'b'", '"a" # "b"', "---"],
)  # fmt: skip
def test_a_text_is_what_was_given_whatever_it_would_mean_in_yaml(text: str) -> None:
    words = [f"label={text}", "items=[{}]", f"items[0].name=n{text}"]
    loaded = settings.load(Outer, None, words)
    assert (loaded.label, loaded.items[0].name) == (text, f"n{text}")


def test_quotes_around_a_text_are_taken_off() -> None:
    for word, label in (("'a  b'", "a  b"), ('"a\\nb"', "a\nb"), ("'it''s'", "it's"), ("''", "")):
        assert settings.load(Outer, None, [f"label={word}"]).label == label


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("count=5 # or 6", "count: expected a whole number, found '5 # or 6'"),
        ("count=5: 6", "count: expected a whole number, found '5: 6'"),
        ("count=1:30", "count: expected a whole number, found '1:30'"),
        ("count=2024-01-01", "count: expected a whole number, found '2024-01-01'"),
        ("inner.rate=0.5 #", "inner.rate: expected a number, found '0.5 #'"),
        ("enabled=true # no", "enabled: expected true or false, found 'true # no'"),
        ("inner.kind=a # b", "inner.kind: expected one of a, b, 3; found 'a # b'"),
        (
            "items=[{name: a}] # [b]",
            "'items=[{name: a}] # [b]': the value cannot be read: found '# [b]' behind its last "
            "bracket",
        ),
        (
            "items=[{name: a #2}]",
            "'items=[{name: a #2}]': the value cannot be read: while parsing a flow mapping",
        ),
    ],
)
def test_nothing_of_a_word_is_taken_for_a_comment(word: str, problem: str) -> None:
    assert problems_of([word]) == [problem]


def test_a_number_with_zeros_before_it_is_decimal() -> None:
    assert settings.load(Outer, None, ["count=010", "items=[{name: a, sizes: [8]}]"]).count == 10


def test_numbers_in_a_file_are_decimal_too_and_times_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("\ufeffcount: &n 010\r\nlabel: 24:00:00  # a day\r\ninner: {limit: *n}\r\n")
    outer = settings.load(Outer, path, ["inner.rate=00.5", "items=[{name: 1:30, sizes: [09]}]"])
    assert (outer.count, outer.label, outer.inner.limit) == (10, "24:00:00", 10)
    assert outer.items == [Item("1:30", [9])] and outer.inner.rate == 0.5


def test_a_number_to_the_base_60_is_none(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("count: 1:30\ninner: {most: 1:30.5}\n")
    assert problems_of([], path) == [
        "count: expected a whole number, found '1:30'",
        "inner.most: expected a number, found '1:30.5'",
    ]


def test_an_interpolation_without_an_end_is_named() -> None:
    (problem,) = problems_of(["label=runs/${count"])
    assert problem.startswith("'label=runs/${count': the value cannot be read: ")


@dataclass(frozen=True)
class Places:
    directory: str = setting("", "a directory", path=True)
    others: list[str] = setting([], "more", path=True)
    label: str = setting("", "a text")


def test_a_path_may_begin_at_a_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["directory=~/runs/x", "others=[~/, a/~, s3://~/b, ./~/c]", "label=~/x"]
    assert settings.load(Places, None, words) == Places(
        str(tmp_path / "runs/x"), [str(tmp_path), "a/~", "s3://~/b", "./~/c"], "~/x"
    )
    file = tmp_path / "c.yaml"
    file.write_text("directory: ~/runs/y\nlabel: ${directory}/z\n")
    assert settings.load(Places, file).directory == str(tmp_path / "runs/y")
    with pytest.raises(SettingsError, match=r"directory: there is no home directory ~nobody-here;"):
        settings.load(Places, None, ["directory=~nobody-here/x"])


def test_resolvers_are_refused_and_read_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "very-secret")
    for word in (
        "label=${oc.env:SOME_KEY}",
        "label=a${ oc.env:SOME_KEY,x}",
        "label=${env:SOME_KEY}",
    ):
        (problem,) = problems_of([word])
        assert problem.startswith("label: ") and "uses a resolver" in problem
        assert "very-secret" not in problem
    (problem,) = problems_of(["items=[{name: '${oc.env:SOME_KEY}'}]"])
    assert problem.startswith("items[0].name: ")


def test_an_interpolation_of_an_unknown_key_is_reported() -> None:
    (problem,) = problems_of(["label=${nowhere}"])
    assert "nowhere" in problem


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"- a\n- b\n", "expected keys with values, found a list"),
        (b"5\n", "expected keys with values, found one value"),
        (b"count: [1\n", "is not valid YAML"),
        (b"count: \xff\n", "is not UTF-8 text"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_a_bad_file_is_reported_by_its_name(
    content: bytes | None, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    (problem,) = problems_of([], path)
    assert problem.startswith(f"{path}: ")
    assert words in problem


def test_a_directory_is_refused_with_the_file_in_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    assert problems_of([], run) == [f"{run}: is a directory; give a YAML file"]
    (run / "config.yaml").write_text("count: 5\n")
    assert problems_of([], run) == [
        f"{run}: is a directory; give a YAML file, e.g. {run}/config.yaml"
    ]


def test_yaml_and_plain_values_are_read_back(tmp_path: Path) -> None:
    config = Outer(5, True, "a: 'b'", Inner(0.1, 3, 2), [Item("one", [1])])
    path = tmp_path / "c.yaml"
    path.write_text(settings.to_yaml(config))
    assert settings.load(Outer, path) == config
    assert settings.from_plain(Outer, settings.to_plain(config)) == config
    with pytest.raises(SettingsError, match="count: expected a whole number"):
        settings.from_plain(Outer, {"count": "5"})


def test_every_key_is_described() -> None:
    assert settings.describe(Outer) == [
        "count = 4  how many",
        "enabled = False  whether",
        "label = 'x'  a label",
        "inner.rate = 0.5  a share",
        "inner.kind = 'a'  a choice",
        "inner.limit = 5  a limit",
        "inner.most = 2.0  the most; none: any",
        "items = []  items",
    ]


def test_a_default_list_is_not_shared() -> None:
    assert Outer().items is not Outer().items


def test_an_unknown_key_or_wrong_value_does_not_hide_what_cannot_work_together() -> None:
    assert problems_of(["count=13", "inner.oops=1", "enabled=3"]) == [
        "enabled: expected true or false, found 3",
        "inner.oops: unknown key; known: rate, kind, limit, most",
        "count: 13 brings bad luck",
    ]


def test_what_follows_from_a_wrong_value_is_not_reported() -> None:
    assert problems_of(["items=[{name: 3}]"]) == ["items[0].name: expected text, found 3"]


def test_mistakes_that_a_worker_finds_reach_its_parent_whole() -> None:
    error = pickle.loads(pickle.dumps(SettingsError(["a: too high", "b: too low"])))
    assert error.problems == ["a: too high", "b: too low"]
    assert str(error) == "  - a: too high\n  - b: too low"


@dataclass(frozen=True)
class Entry:
    name: str
    size: int | None
    more: dict[str, Any]
    count: int = 0


@dataclass(frozen=True)
class Table:
    first: Entry
    entries: list[Entry]


def test_a_value_without_a_default_must_be_there_and_right() -> None:
    table = Table(Entry("a", None, {"x": [1]}), [Entry("b", 3, {}, 2)])
    plain = settings.to_plain(table)
    assert settings.from_plain(Table, plain) == table
    first, entry = plain["first"], plain["entries"][0]
    for wrong, problems in (
        ({"entries": []}, ["first: missing"]),
        (
            {"first": {}, "entries": []},
            [f"first.{key}: missing" for key in ("name", "size", "more")],
        ),
        (
            {**plain, "first": {**first, "size": "3"}},
            ["first.size: expected a whole number, found '3'"],
        ),
        ({**plain, "first": {**first, "more": []}}, ["first.more: expected keys, found []"]),
        ({**plain, "entries": [entry, 4]}, ["entries[1]: expected keys, found 4"]),
        ([], ["configuration: expected keys, found []"]),
    ):
        with pytest.raises(SettingsError) as caught:
            settings.from_plain(Table, wrong)
        assert caught.value.problems == problems


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 2001-99-99\n", "is not valid YAML: month must be in 1..12"),
        ("a: " + "[" * 3000 + "]" * 3000, "is nested too deeply"),
    ],
)
def test_yaml_that_its_reader_breaks_on_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        settings.load(Entry, path)
    assert caught.value.problems == [f"{path}: {problem}"]


def test_a_word_that_is_nested_too_deeply_is_refused() -> None:
    with pytest.raises(SettingsError) as caught:
        settings.load(Place, None, ["path=x", "numbers=" + "[" * 3000 + "]" * 3000])
    assert caught.value.problems == ["numbers: the value is nested too deeply"]


@dataclass(frozen=True)
class Place:
    path: str = settings.setting("", "a place", path=True)
    numbers: list[int] = settings.setting([], "numbers")


@pytest.mark.parametrize(
    "url", ["https://me:word@host/set", "s3://b/set?X-Amz-Signature=1", "https://h/set?a=1&token=x"]
)
def test_a_place_with_credentials_is_refused_without_repeating_them(url: str) -> None:
    with pytest.raises(SettingsError) as caught:
        settings.load(Place, None, [f"path={url}"])
    (problem,) = caught.value.problems
    assert problem.startswith("path: holds credentials") and url not in problem
    for other in ("https://h/set?download=true", "a@b/c?token=1", "s3://bucket/set"):
        assert settings.load(Place, None, [f"path={other}"]).path == other


def test_an_override_in_place_of_the_file_or_of_an_item_that_is_not_there_is_told() -> None:
    for path, word, problem in (
        (Path("names=b"), "names=[b]", "names=b: is an override; give the configuration's file"),
        (None, "names[0]=a", "names: the file gives no list to change; give it whole, names=["),
    ):
        with pytest.raises(SettingsError) as raised:
            settings.load(Lists, path, [word])
        (found,) = raised.value.problems
        assert found.startswith(problem)
    assert settings.load(Lists, None, ["names=[b]"]).names == ["b"]


@dataclass(frozen=True)
class Lists:
    names: list[str] = setting([], "some")
