"""The registry hands out what a use allows, checks every byte, and says how to get what is missing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from steering.errors import DatasetCorrupt, DatasetMissing, DatasetMisuse
from steering.fit import datasets
from steering.fit.catalog import CATALOG
from steering.fit.datasets import DataDirectory, Record, deduplicate, normalised, use_of
from steering.fit.prompts import PARTS
from steering.fit.sources import DataSet, Label, Part, SourceFile, Use, from_csv

NEVER_FITTED = (
    ("xstest", "safe"),
    ("xstest", "unsafe"),
    ("jailbreakbench", "harmful"),
    ("jailbreakbench", "benign"),
    ("coconot", "contrast"),
    ("ccp_sensitive", "sampled_test"),
    ("gsm8k", "test"),
    ("alphasteer_attacks", "aim"),
    ("alphasteer_attacks", "jailbroken"),
    ("cast_conditions", "harmful_test"),
)
ROWS = {
    ("catqa", "all"): 550,
    ("harmfulqa", "harmfulqa"): 1960,
    ("ailuminate_demo", "all"): 1200,
    ("advbench", "all"): 520,
    ("coconot", "eval"): 1001,
    ("coconot", "contrast"): 379,
    ("coconot", "pref"): 927,
    ("or_bench_borderline", "all"): 8850,
    ("gsm8k", "test"): 1319,
    ("ccp_sensitive", "train"): 1020,
    ("jailbreakbench", "benign"): 100,
    ("xstest", "safe"): 250,
    ("xstest", "unsafe"): 200,
    ("xstest", "completions_gpt4"): 450,
}
TEXT = "prompt\nHow do I tie a knot?\nWhat is tea?\n"


def _toy(*, address: str | None, text: str = TEXT) -> DataSet:
    source = SourceFile(
        name="toy.csv",
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        columns=("prompt",),
        address=address,
        conversion="" if address else "turn the list into a table",
    )
    part = Part(name="all", file="toy.csv", shares={Use.FIT: 1.0}, read=from_csv("prompt", Label.BENIGN))
    return DataSet(
        name="toy",
        title="Toy",
        repository="someone/toy",
        commit="abc",
        licence="MIT",
        attribution="nobody",
        files=(source,),
        parts=(part,),
    )


def _record(prompt: str, *, dataset: str = "toy", part: str = "all") -> Record:
    return Record(key=f"{dataset}/{part}/{prompt}", dataset=dataset, part=part, prompt=prompt, label=Label.BENIGN)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A data directory with one converted set of two rows in the registry."""
    monkeypatch.setattr(datasets, "CATALOG", (_toy(address=None),))
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "toy.csv").write_text(TEXT, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(("name", "part"), NEVER_FITTED)
def test_a_test_set_cannot_be_fitted_on_or_calibrated_on(name: str, part: str, tmp_path: Path) -> None:
    """Asking a test-only part for another use raises before any file is read."""
    for use in (Use.FIT, Use.CALIBRATE):
        with pytest.raises(DatasetMisuse, match="registered for: test"):
            DataDirectory(path=tmp_path).load(name, part, use)


def test_every_part_reads_a_file_of_its_set_and_its_shares_add_up_to_one() -> None:
    """A part names an existing file, and its hash split covers every row once."""
    for dataset in CATALOG:
        files = {file.name for file in dataset.files}
        for part in dataset.parts:
            assert part.file in files, f"{dataset.name}/{part.name}"
            assert sum(part.shares.values()) == pytest.approx(1.0)


def test_every_file_has_an_address_pinned_to_a_commit_or_says_how_it_was_converted() -> None:
    """No file is without a way to get it, and no address can change its bytes unnoticed."""
    for dataset in CATALOG:
        for file in dataset.files:
            assert len(file.sha256) == 64
            if file.address is None:
                assert len(file.conversion) > 20, f"{dataset.name}/{file.name}"
            else:
                assert dataset.commit is not None
                assert dataset.commit in file.address


def test_coconot_eval_keeps_about_forty_percent_for_testing_and_never_moves_a_row() -> None:
    """The split is a function of the row's id alone."""
    part = next(
        part for dataset in CATALOG if dataset.name == "coconot" for part in dataset.parts if part.name == "eval"
    )
    uses = [use_of(part, f"coconot/eval/row{number}") for number in range(4000)]
    assert uses.count(Use.TEST) / len(uses) == pytest.approx(0.40, abs=0.03)
    assert use_of(part, "coconot/eval/bajp42a") is use_of(part, "coconot/eval/bajp42a")


def test_a_missing_converted_file_names_the_place_and_the_conversion(toy: Path) -> None:
    """The message says which set and file, where it was looked for, and how to make it; no download is tried."""
    (toy / "toy" / "toy.csv").unlink()
    with pytest.raises(DatasetMissing) as caught:
        DataDirectory(path=toy, may_download=True).load("toy", "all", Use.FIT)
    message = str(caught.value)
    for fact in ("'toy'", "toy.csv", str(toy), "turn the list into a table", "someone/toy", "MIT"):
        assert fact in message


def test_a_changed_byte_is_an_error(toy: Path) -> None:
    """A file that differs from its digest is never used."""
    path = toy / "toy" / "toy.csv"
    path.write_text(TEXT.replace("tea", "tee"), encoding="utf-8")
    with pytest.raises(DatasetCorrupt, match="the registry needs"):
        DataDirectory(path=toy).load("toy", "all", Use.FIT)


def test_an_explicit_directory_is_never_downloaded_into(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With --data or the variable set, a missing file is an error that names its address."""
    monkeypatch.setattr(datasets, "CATALOG", (_toy(address="https://example.invalid/abc/toy.csv"),))
    with pytest.raises(DatasetMissing, match=r"download https://example\.invalid/abc/toy\.csv"):
        DataDirectory.resolve(tmp_path).load("toy", "all", Use.FIT)
    assert list(tmp_path.iterdir()) == []


def test_a_download_is_checked_and_renamed_into_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Into the cache a file is fetched once; wrong bytes leave nothing behind."""
    import httpx

    monkeypatch.setattr(datasets, "CATALOG", (_toy(address="https://example.invalid/abc/toy.csv"),))
    answers = [b"wrong bytes", TEXT.encode()]

    def get(url: str, **_options: object) -> httpx.Response:
        return httpx.Response(200, content=answers.pop(0), request=httpx.Request("GET", url))

    monkeypatch.setattr(httpx, "get", get)
    directory = DataDirectory(path=tmp_path, may_download=True)
    with pytest.raises(DatasetCorrupt):
        directory.load("toy", "all", Use.FIT)
    assert not list(tmp_path.rglob("*.csv*"))
    assert [record.prompt for record in directory.load("toy", "all", Use.FIT)] == [
        "How do I tie a knot?",
        "What is tea?",
    ]
    assert len(directory.load("toy", "all", Use.FIT)) == 2, "the second time nothing is fetched"


def test_the_directory_is_the_argument_then_the_variable_then_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only the cache may be written to."""
    monkeypatch.setenv("TRIMTAB_DATA", str(tmp_path / "named"))
    assert DataDirectory.resolve(tmp_path / "given") == DataDirectory(path=tmp_path / "given")
    assert DataDirectory.resolve() == DataDirectory(path=tmp_path / "named")
    monkeypatch.delenv("TRIMTAB_DATA")
    assert DataDirectory.resolve().may_download


def test_equal_prompts_meet_after_normalising() -> None:
    """Case, punctuation, width and spacing do not hide a repeat; words do not merge."""
    assert normalised("How do  I tie—a KNOT?") == normalised("how do i tie a knot")
    assert normalised("ＡＢＣ") == "abc"
    assert normalised("to day") != normalised("today")


def test_deduplication_drops_held_prompts_and_repeats_and_counts_both() -> None:
    """The first of several equal prompts is kept, a held one never, and the counts say why."""
    held = _record("What is tea?", dataset="held")
    result = deduplicate([_record("what is TEA"), _record("A"), _record("a!", part="other")], protected=[held])
    assert [record.prompt for record in result.records] == ["A"]
    assert result.dropped == {"toy/all: held held/all": 1, "toy/other: repeats toy/all": 1}


@pytest.mark.needs_data
def test_every_registered_file_here_has_its_digest_and_its_rows(data_directory: Path) -> None:
    """The registry agrees with the data directory, byte for byte, for fit, calibration and test sets alike."""
    directory = DataDirectory(path=data_directory)
    for dataset in CATALOG:
        for file in dataset.files:
            assert directory.read(dataset, file)
        for part in dataset.parts:
            records = [record for use in part.shares for record in directory.load(dataset.name, part.name, use)]
            assert len({record.key for record in records}) == len(records)
            wanted = ROWS.get((dataset.name, part.name))
            assert wanted is None or len(records) == wanted, f"{dataset.name}/{part.name}"


@pytest.mark.needs_data
def test_no_held_prompt_is_left_among_those_fitted_or_calibrated_on(data_directory: Path) -> None:
    """After deduplication fit, calibration and test prompts are disjoint by normalised match."""
    directory = DataDirectory(path=data_directory)
    held = {normalised(record.prompt) for record in datasets.held_records(directory)}
    fitted = {
        normalised(record.prompt) for record in datasets.fit_records(directory, datasets.parts_for(Use.FIT)).records
    }
    calibrated = {
        normalised(record.prompt)
        for record in datasets.fit_records(
            directory, [("or_bench_borderline", "all"), ("advbench", "all"), ("coconot", "eval")], Use.CALIBRATE
        ).records
    }
    assert held
    assert fitted
    assert calibrated
    assert not held & fitted
    assert not held & calibrated
    assert not fitted & calibrated


@pytest.mark.needs_data
def test_a_set_that_is_left_out_of_a_fit_can_be_tested_on(data_directory: Path) -> None:
    """None of its prompts is fitted or calibrated on, whichever other set has them too."""
    directory, parts = DataDirectory(path=data_directory), PARTS
    everything = datasets.load_parts(directory, [("advbench", "all")], Use.FIT)
    advbench = {normalised(record.prompt) for record in everything}
    for use in (Use.FIT, Use.CALIBRATE):
        kept = datasets.fit_records(directory, parts, use, without=["advbench"]).records
        assert len(kept) > 1000
        assert not advbench & {normalised(record.prompt) for record in kept}
    assert advbench & {normalised(record.prompt) for record in datasets.fit_records(directory, parts).records}
