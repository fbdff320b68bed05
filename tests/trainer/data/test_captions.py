import random
from collections import Counter

import pytest

from trainer.config import DataConfig, DatasetConfig
from trainer.data.captions import as_class, contains, draw, is_random, with_trigger

TAGS = "ohwx, red hair, smile, hat, window, rain, coat"


def source(trigger: str = "ohwx", **more) -> DataConfig:
    return DataConfig(folder=".", trigger=trigger, **more)


def drawn(caption: str = TAGS, trigger: str = "ohwx", times: int = 500, folder: dict | None = None, **options) -> list[str]:
    config = DatasetConfig(**options)
    return [draw(caption, source(trigger, **(folder or {})), config, random.Random(seed)) for seed in range(times)]


@pytest.mark.parametrize("caption", ["", TAGS, "a , b,,c ,", "  odd\tspace ,x", "é, «ü»\n"])
def test_without_options_the_caption_is_unchanged_and_nothing_is_drawn(caption):
    rng = random.Random(1)
    before = rng.getstate()
    assert not is_random(DatasetConfig())
    assert draw(caption, source(), DatasetConfig(), rng) == caption
    assert rng.getstate() == before


@pytest.mark.parametrize("option", [{"shuffle_tags": True}, {"caption_dropout": 0.1}, {"tag_dropout": 0.1}])
def test_each_option_is_random_and_changes_some_caption(option):
    assert is_random(DatasetConfig(**option))
    assert len(set(drawn(**option))) > 1


def test_keep_tags_alone_is_not_random():
    assert not is_random(DatasetConfig(keep_tags=5))


def test_caption_dropout_empties_its_share_and_leaves_the_rest_unchanged():
    counts = Counter(drawn("a ,b,  c", caption_dropout=0.3, times=2000))
    assert set(counts) == {"", "a ,b,  c"}
    assert 0.26 < counts[""] / 2000 < 0.34


def test_shuffle_keeps_the_leading_parts_and_loses_nothing():
    results = drawn(shuffle_tags=True, keep_tags=2)
    assert {tuple(r.split(", ")[:2]) for r in results} == {("ohwx", "red hair")}
    assert all(sorted(r.split(", ")) == sorted(TAGS.split(", ")) for r in results)
    assert {r.split(", ")[2] for r in results} == {"smile", "hat", "window", "rain", "coat"}


def test_tag_dropout_drops_its_share_in_order_but_never_a_held_part():
    results = drawn(tag_dropout=0.4, keep_tags=2, times=1000)
    everything = TAGS.split(", ")
    for result in results:
        parts = result.split(", ")
        assert parts[:2] == everything[:2]
        assert parts == [tag for tag in everything if tag in parts]
    assert 0.57 < sum(len(r.split(", ")) - 2 for r in results) / (5 * 1000) < 0.63


def test_the_part_with_the_trigger_keeps_its_place_and_is_never_dropped():
    caption = "a photo, red hair, OHWX woman, hat, rain"
    results = drawn(caption, shuffle_tags=True, keep_tags=0)
    assert all(r.split(", ")[2] == "OHWX woman" for r in results)
    assert all("OHWX woman" in r for r in drawn(caption, tag_dropout=0.95, keep_tags=0))
    assert not all("OHWX woman" in r for r in drawn(caption, trigger="other", tag_dropout=0.95, keep_tags=0))


def test_all_parts_may_go():
    assert "" in drawn("a, b", trigger="", tag_dropout=0.9, keep_tags=0)


def test_empty_parts_vanish_where_parts_are_drawn():
    assert drawn("a,, b ,", shuffle_tags=True, times=1) == ["a, b"]


def test_the_draws_of_one_option_do_not_hang_on_another():
    dropped = drawn(tag_dropout=0.4)
    both = drawn(tag_dropout=0.4, shuffle_tags=True)
    assert [set(a.split(", ")) for a in dropped] == [set(b.split(", ")) for b in both]
    with_dropout = drawn(tag_dropout=0.4, shuffle_tags=True, caption_dropout=0.2)
    assert all(a in ("", b) for a, b in zip(with_dropout, both, strict=True))


def test_the_same_seed_draws_the_same_caption_in_every_version():
    config = DatasetConfig(shuffle_tags=True, tag_dropout=0.3, caption_dropout=0.1)
    assert draw(TAGS, source(), config, random.Random(0)) == "ohwx, coat, red hair, smile, rain, window"


@pytest.mark.parametrize(
    ("caption", "words", "expected"),
    [
        ("a photo of ohwx", "ohwx", True),
        ("a photo of OHWX, hat", "ohwx", True),
        ("ohwxman", "ohwx", False),
        ("my_ohwx", "ohwx", False),
        ("(ohwx:1.2)", "ohwx", True),
        ("in the style of a.b", "a.b", True),
        ("in the style of axb", "a.b", False),
        ("une élève ici", "élève", True),
        ("c++ on a wall", "c++", True),
        ("ohwx  woman", "ohwx woman", False),
    ],
)
def test_contains_finds_whole_words(caption, words, expected):
    assert contains(caption, words) is expected


@pytest.mark.parametrize(
    ("caption", "trigger", "class_word", "expected"),
    [
        ("a hat", "ohwx", "woman", "ohwx, a hat"),
        ("a hat on Ohwx", "ohwx", "woman", "a hat on Ohwx"),
        ("a hat", "", "woman", "a hat"),
        ("", "ohwx", "woman", "ohwx woman"),
        ("", "ohwx", "", "ohwx"),
        ("", "", "woman", "woman"),
        ("", "", "", ""),
    ],
)
def test_with_trigger(caption, trigger, class_word, expected):
    assert with_trigger(caption, trigger, class_word) == expected


def test_one_of_several_lines_is_drawn_at_each_visit():
    lines = ["ohwx, on a sofa", "ohwx sits indoors", "a photo of ohwx"]
    seen = Counter(drawn("\n".join(lines)))
    assert set(seen) == set(lines) and min(seen.values()) > 120
    assert is_random(DatasetConfig(), "\n".join(lines))


def test_choices_are_drawn_from_the_innermost_out_and_only_when_asked_for():
    text = "ohwx, {red|{dark|light} blue} coat, {rain|}"
    assert set(drawn(text)) == {text} and not is_random(DatasetConfig(), text)
    seen = Counter(drawn(text, wildcards=True))
    assert set(seen) == {f"ohwx, {c} coat, {r}" for c in ("red", "dark blue", "light blue") for r in ("rain", "")}
    red = sum(n for t, n in seen.items() if "red" in t)
    assert 190 < red < 310 and is_random(DatasetConfig(wildcards=True), text)
    assert set(drawn("a {brace} and a {lone", wildcards=True)) == {"a {brace} and a {lone"}


def test_parts_before_the_mark_stay_and_the_mark_vanishes():
    text = "ohwx, red hair, smile ||| hat, window, rain"
    assert set(drawn(text, keep_separator="|||")) == {"ohwx, red hair, smile, hat, window, rain"}
    seen = drawn(text, keep_separator="|||", shuffle_tags=True, tag_dropout=0.5, keep_tags=2)
    assert all(t.startswith("ohwx, red hair, smile") for t in seen) and len(set(seen)) > 5
    assert set(drawn(TAGS, keep_separator="|||")) == {TAGS}


def test_prefix_and_suffix_stand_round_every_caption_but_an_empty_one():
    folder = {"prefix": "masterpiece,", "suffix": ", in the style of ohwx"}
    seen = set(drawn("a cat", folder=folder, caption_dropout=0.2))
    assert seen == {"masterpiece, a cat , in the style of ohwx".replace(" ,", ","), ""}


@pytest.mark.parametrize(
    "caption, trigger, said",
    [
        ("ohwx on a sofa", "ohwx", "cat on a sofa"),
        ("ohwx, a cat, on a sofa", "ohwx", "cat, on a sofa"),
        ("a photo of OHWX cat", "ohwx", "a photo of cat"),
        ("on a sofa", "ohwx", "cat"),
        ("anything", "", "cat"),
    ],
)
def test_what_a_caption_says_of_the_class(caption, trigger, said):
    assert as_class(caption, trigger, "cat") == said
    assert as_class(caption, trigger, "") == ""


def test_each_of_several_captions_gets_the_trigger():
    assert with_trigger("a cat\nohwx sleeps", "ohwx", "cat") == "ohwx, a cat\nohwx sleeps"
