"""Scoring a results file, and a model on shards: the official figures, one caption for each image, refusals."""

import json
import os
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from tiny import captions_of, write_shards
from tiny_model import caption_views, set_statistics

from captioner.errors import UserError
from captioner.images.views import ViewSpec, normalise
from captioner.metrics import References, sum_counts
from captioner.model.bundle import DecodingDefaults, load_bundle, save_bundle
from captioner.model.network import ModelConfig, build_model
from captioner.vocabulary import END, Vocabulary, tokenize
from train.evaluate import main
from train.evaluation.settings import EvaluateSettings

REPOSITORY = Path(__file__).resolve().parents[2]
OFFICIAL = REPOSITORY.parent / "shared" / "data" / "metrics"
OFFICIAL_NAMES = {"rouge_l": "ROUGE_L", "cider": "CIDEr"} | {f"bleu{n}": f"Bleu_{n}" for n in (1, 2, 3, 4)}
TORCHRUN = ("torchrun", "--nproc_per_node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")

RESULTS: list[dict[str, Any]] = [
    {"image_id": 7, "caption": "A man rides a wave."},
    {"image_id": 8, "caption": "Two dogs on a sofa"},
]
ANNOTATIONS: list[dict[str, Any]] = [
    {"image_id": 7, "id": 1, "caption": "A surfer rides a large wave."},
    {"image_id": 7, "id": 2, "caption": "A man rides a wave on his surfboard."},
    {"image_id": 8, "id": 3, "caption": "Two dogs sleep on a sofa."},
]


INTERVALS = ("bleu4", "rouge_l", "cider")


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def coco(annotations: list[Any]) -> dict[str, Any]:
    return {"images": [{"id": row["image_id"]} for row in annotations], "annotations": annotations}


def score_files(folder: Path, results: Any = RESULTS, references: Any = None, **flags: Any) -> dict[str, Any]:
    """What the command writes about these contents of the two files."""
    settings = EvaluateSettings(
        results=write(folder / "results.json", results),
        references=write(folder / "references.json", coco(ANNOTATIONS) if references is None else references),
        json=folder / "scores.json",
        **flags,
    )
    main(settings)
    return json.loads((folder / "scores.json").read_text())


def refusal(settings: EvaluateSettings) -> str:
    with pytest.raises(UserError) as error:
        main(settings)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- a results file -------------------------------------------------------------------------------------------


def test_a_results_file_gets_the_scores_of_its_captions(tmp_path: Path) -> None:
    found = score_files(tmp_path)
    captions = {row["image_id"]: row["caption"] for row in RESULTS}
    references = References(
        {key: [row["caption"] for row in ANNOTATIONS if row["image_id"] == key] for key in captions}
    )
    scores, metrics = references.scores(captions), found["metrics"]
    assert scores.items() <= metrics.items()
    assert all(metrics[f"{name}_low"] <= scores[name] <= metrics[f"{name}_high"] for name in INTERVALS)
    assert (metrics["mean_tokens"], metrics["different_captions"]) == (5, 2)
    counts = sum_counts(image.bleu_counts for image in references.image_scores(captions).values())
    assert found["bleu_counts"] == counts._asdict()
    assert (found["num_images"], found["num_without_result"]) == (2, 0)


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    results, references = write(tmp_path / "r.json", RESULTS), write(tmp_path / "c.json", coco(ANNOTATIONS))
    program = (
        "import sys; from train.evaluate import run; "
        f"sys.argv[1:] = ['--results', {str(results)!r}, '--references', {str(references)!r}]; run(); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "cider" in done.stdout


def test_images_without_a_result_are_counted_and_change_no_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = score_files(tmp_path)
    more = [{"image_id": key, "id": key, "caption": "A wave and a sofa"} for key in (9, 10, 11)]
    found = score_files(tmp_path, references=coco(ANNOTATIONS + more))
    assert found["metrics"] == expected["metrics"]
    assert found["num_without_result"] == 3
    assert "3 of 5 images" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [str, float])
@pytest.mark.parametrize("of_results", [True, False])
def test_ids_may_be_text_in_one_file_and_numbers_in_the_other(tmp_path: Path, kind: type, of_results: bool) -> None:
    expected = score_files(tmp_path)["metrics"]
    results, references = (
        [row | {"image_id": kind(row["image_id"])} for row in rows] for rows in (RESULTS, ANNOTATIONS)
    )
    if of_results:
        assert score_files(tmp_path, results)["metrics"] == expected
    else:
        assert score_files(tmp_path, references=coco(references))["metrics"] == expected
        mixed = coco(ANNOTATIONS) | {"annotations": [*ANNOTATIONS[:1], *references[1:]]}
        assert score_files(tmp_path, references=mixed)["metrics"] == expected


@pytest.mark.parametrize(
    ("results", "said"),
    [
        ([*RESULTS, {"image_id": 7, "caption": "a dog"}], "has image 7 2 times"),
        ([*RESULTS, {"image_id": 99, "caption": "a dog"}], "no captions of 1 of the images"),
        ([{"image_id": "07", "caption": "a dog"}], "such as '07'"),
        ([*RESULTS, {"image_id": "7", "caption": "a dog"}], "has image 7 2 times"),
        ([{"image_id": 7.5, "caption": "a dog"}], "in row 0"),
        ([{"image_id": True, "caption": "a dog"}], "in row 0"),
        ([*RESULTS, {"image_id": 8}], "in row 2"),
        ([{"image_id": 7, "caption": None}], "in row 0"),
        ([{"image_id": None, "caption": "a dog"}], "in row 0"),
        (["a dog"], "in row 0"),
        ({"annotations": RESULTS}, "no list of captions"),
        ([], "holds no captions"),
    ],
)
def test_other_results_are_refused(tmp_path: Path, results: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        score_files(tmp_path, results)
    assert "results.json" in str(error.value)


@pytest.mark.parametrize(
    ("references", "said"),
    [
        (ANNOTATIONS, "has no annotations"),
        ({"images": []}, "has no annotations"),
        ({"annotations": {}}, "no list of captions"),
        (coco([*ANNOTATIONS, {"image_id": 8, "caption": 5}]), "in row 3"),
        (coco(ANNOTATIONS[:2]), "such as 8"),
        ({"annotations": [*ANNOTATIONS, {"image_id": "8", "caption": "a"}]}, "image 8 and of image '8'"),
    ],
)
def test_other_references_are_refused(tmp_path: Path, references: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        score_files(tmp_path, references=references)
    assert "references.json" in str(error.value)


def test_files_that_are_absent_or_no_json_are_named(tmp_path: Path) -> None:
    good, broken = write(tmp_path / "good.json", RESULTS), tmp_path / "broken.json"
    broken.write_text('[{"image_id"')
    for results, references in ((tmp_path / "absent.json", good), (broken, good)):
        assert str(results) in refusal(EvaluateSettings(results=results, references=references))
    assert str(broken) in refusal(EvaluateSettings(results=good, references=broken))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (EvaluateSettings(), "--model and --shards"),
        (EvaluateSettings(model=Path("m")), "--model and --shards"),
        (EvaluateSettings(results=Path("r")), "both --results and --references"),
        (EvaluateSettings(references=Path("r")), "both --results and --references"),
        (EvaluateSettings(results=Path("r"), references=Path("c"), model=Path("m")), "--model is for captioning"),
        (EvaluateSettings(results=Path("r"), references=Path("c"), beam_size=5), "--beam-size is for captioning"),
        (EvaluateSettings(results=Path("r"), references=Path("c"), batch_size=64), "--batch-size is for captioning"),
    ],
)
def test_flags_of_two_uses_and_halves_of_one_are_refused(settings: EvaluateSettings, said: str) -> None:
    assert said in refusal(settings)


@pytest.fixture(scope="module")
def official() -> dict[str, Any]:
    if not OFFICIAL.is_dir():
        pytest.skip(f"{OFFICIAL} is absent: the official program's output is not part of the repository")
    return json.loads((OFFICIAL / "official.json").read_text())


@pytest.mark.slow
def test_the_figures_are_those_of_the_official_program(tmp_path: Path, official: dict[str, Any]) -> None:
    main(
        EvaluateSettings(
            results=OFFICIAL / "predictions.json",
            references=OFFICIAL / "references.json",
            json=tmp_path / "scores.json",
        )
    )
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["num_images"] == official["images"]
    for ours, theirs in OFFICIAL_NAMES.items():
        assert found["metrics"][ours] == pytest.approx(official[theirs], abs=2e-5, rel=0), ours
    assert found["bleu_counts"]["guess"] == official["guess"]
    assert found["bleu_counts"]["correct"] == pytest.approx(official["correct"], abs=5, rel=0)


# ---- two results files ------------------------------------------------------------------------------------------

OTHERS: list[dict[str, Any]] = [
    {"image_id": "8", "caption": "Two dogs sleep on a sofa with a"},
    {"image_id": 7, "caption": "A man rides a wave."},
]


def test_a_results_file_is_no_different_from_itself(tmp_path: Path) -> None:
    against = score_files(tmp_path, against=write(tmp_path / "same.json", RESULTS))["against"]
    nothing = {"value": 0, "low": 0, "high": 0, "excludes_zero": False}
    assert against["differences"] == dict.fromkeys(INTERVALS, nothing)


def test_swapped_files_have_the_opposite_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In whatever order the files have the images, and whether as numbers or text."""
    first, second = (
        score_files(tmp_path, own, against=write(tmp_path / "other.json", other))
        for own, other in ((RESULTS, OTHERS), (OTHERS, RESULTS))
    )
    assert first["metrics"] == second["against"]["metrics"]
    assert first["against"]["metrics"] == second["metrics"]
    assert second["metrics"]["dangling_ends"] == 0.5
    for name in INTERVALS:
        own, opposite = (found["against"]["differences"][name] for found in (first, second))
        assert own["value"] == first["metrics"][name] - second["metrics"][name] != 0
        assert (own["value"], own["low"], own["high"]) == (-opposite["value"], -opposite["high"], -opposite["low"])
    assert "compared with" in capsys.readouterr().out


def test_images_that_only_one_of_two_results_has_are_named(tmp_path: Path) -> None:
    more = [{"image_id": key, "caption": "a cat"} for key in (99, 98, 97, 96)]
    for others, said in (
        (OTHERS[:1], r"1 only in .*results\.json \(7\)"),
        (OTHERS + more, r"4 only in .*others\.json \(99, 98, 97, \.\.\.\)"),
        (OTHERS[1:] + more[:1], r"1 only in .*results\.json \(8\) and 1 only in .*others\.json \(99\)"),
        ([*OTHERS, RESULTS[1]], "others.json has image 8 2 times"),
    ):
        with pytest.raises(UserError, match=said):
            score_files(tmp_path, against=write(tmp_path / "others.json", others))
    assert not (tmp_path / "scores.json").exists()


# ---- METEOR and SPICE -------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR needs Java")
def test_meteor_is_the_official_one(tmp_path: Path, official: dict[str, Any]) -> None:
    pytest.importorskip("pycocoevalcap", reason="METEOR needs pip install -e '.[java]'")
    results, references = (
        json.loads((OFFICIAL / f"{name}.json").read_text()) for name in ("predictions", "references")
    )
    found = score_files(tmp_path, results, references, java_metrics=("meteor",))
    assert found["metrics"]["meteor"] == pytest.approx(official["METEOR"], abs=2e-5, rel=0)


@pytest.fixture
def fake_package(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands for pycocoevalcap and Java: each metric is 0.25, or what is put here is raised; `texts` is what it got."""
    fake: dict[str, Any] = {}

    class Metric:
        def compute_score(self, references: Any, candidates: Any) -> tuple[float, None]:
            fake["texts"] = (references, candidates)
            if "raised" in fake:
                raise fake["raised"]
            return 0.25, None

    for name in ("", ".meteor", ".meteor.meteor", ".spice", ".spice.spice"):
        module: Any = types.ModuleType(f"pycocoevalcap{name}")
        module.Meteor = module.Spice = Metric
        monkeypatch.setitem(sys.modules, f"pycocoevalcap{name}", module)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    return fake


def test_java_metrics_get_tokens_and_stand_beside_the_others(tmp_path: Path, fake_package: dict[str, Any]) -> None:
    plain = score_files(tmp_path)["metrics"]
    found = score_files(tmp_path, java_metrics=("meteor", "spice"))["metrics"]
    assert found == plain | {"meteor": 0.25, "spice": 0.25}
    references, candidates = fake_package["texts"]
    assert list(candidates.values()) == [["a man rides a wave"], ["two dogs on a sofa"]]
    assert references.keys() == candidates.keys()
    assert references[1] == ["two dogs sleep on a sofa"]


@pytest.mark.parametrize(
    ("metric", "raised", "said"),
    [
        ("meteor", ValueError("could not convert string to float: ''"), "METEOR's Java program failed"),
        ("meteor", BrokenPipeError(), "METEOR's Java program failed"),
        ("spice", subprocess.CalledProcessError(1, "java"), "ended with code 1"),
    ],
)
def test_a_java_program_that_fails_is_one_line(
    tmp_path: Path, fake_package: dict[str, Any], metric: Any, raised: Exception, said: str
) -> None:
    fake_package["raised"] = raised
    with pytest.raises(UserError, match=said):
        score_files(tmp_path, java_metrics=(metric,))


def test_a_parser_that_cannot_be_downloaded_is_one_line(
    tmp_path: Path, fake_package: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network() -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(sys.modules["pycocoevalcap.spice.spice"], "Spice", no_network)
    with pytest.raises(UserError, match=r"SPICE cannot download .* \(Name or service not known\): run it once"):
        score_files(tmp_path, java_metrics=("spice",))


def test_a_missing_package_or_java_is_told_before_anything_is_read(
    fake_package: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = EvaluateSettings(results=Path("absent"), references=Path("absent"), java_metrics=("meteor",))
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "without Java" in refusal(settings)
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    assert "pip install -e '.[java]'" in refusal(settings)


# ---- a model ----------------------------------------------------------------------------------------------------

NUM_IMAGES, BATCH = 9, 4  # the last batch holds one image: a second process has none


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("shards"), [5, 4], split="val", size=40, first=100)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model whose captions depend on the picture."""
    words = {word for seed in range(200) for caption in captions_of(seed) for word in tokenize(caption)}
    vocabulary, view = Vocabulary.from_counts(dict.fromkeys(words, 9), threshold=1), ViewSpec(size=40, crop=32)
    torch.manual_seed(1)
    config = ModelConfig(encoder="small_cnn", vocabulary_size=len(vocabulary), embedding_size=8, hidden_size=9)
    model = build_model(config)
    with torch.no_grad():
        for parameter in (model.norm.weight, model.predict.weight):
            parameter.mul_(8)
        model.predict.bias[END] += 2.5  # captions of several lengths
        patches = torch.rand(16, 3, 4, 4)
        pictures = torch.nn.functional.interpolate(patches, size=(32, 32), mode="bicubic").clamp(0, 1)
    set_statistics(model, normalise((pictures.permute(0, 2, 3, 1) * 255).to(torch.uint8), view))
    folder = tmp_path_factory.mktemp("trained") / "model"
    decoding = DecodingDefaults(beam_size=2, max_tokens=7)
    save_bundle(folder, model=model.eval(), view=view, vocabulary=vocabulary, decoding=decoding, metrics={})
    return folder


def score_model(folder: Path, model: Path, shards: str, **flags: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the command writes about a model: the scores, and the results file."""
    settings = EvaluateSettings(
        model=model, shards=(shards,), output=folder / "captions.json", json=folder / "model.json", batch_size=BATCH,
        workers=0,
    )  # fmt: skip
    main(replace(settings, **flags))
    return json.loads((folder / "model.json").read_text()), json.loads((folder / "captions.json").read_text())


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, model: Path, shards: str) -> Any:
    """What the command writes about the model without further flags."""
    return score_model(tmp_path_factory.mktemp("scored"), model, shards)


def test_a_model_captions_each_image_once_and_its_results_file_scores_the_same(tmp_path: Path, scored: Any) -> None:
    found, results = scored
    assert [row["image_id"] for row in results] == list(range(100, 100 + NUM_IMAGES))
    assert len({row["caption"] for row in results}) > 1
    assert found["num_images"] == NUM_IMAGES
    annotations = [{"image_id": row["image_id"], "caption": c} for row in results for c in captions_of(row["image_id"])]
    again = score_files(tmp_path, results, coco(annotations))
    assert again["metrics"].items() <= found["metrics"].items()
    assert again["bleu_counts"] == found["bleu_counts"]


def test_a_loss_that_is_no_number_is_one_line(tmp_path: Path, model: Path, shards: str) -> None:
    """Its weights are numbers, but too large to compute with; nothing of it is written."""
    bundle = load_bundle(model)
    with torch.no_grad():
        bundle.model.predict.weight.mul_(1e37)
    save_bundle(
        tmp_path / "model", model=bundle.model, view=bundle.view, vocabulary=bundle.vocabulary, metrics={},
        decoding=bundle.decoding,
    )  # fmt: skip
    output = tmp_path / "r.json"
    settings = EvaluateSettings(model=tmp_path / "model", shards=(shards,), output=output, batch_size=BATCH, workers=0)
    assert "the loss of the evaluated split is" in refusal(settings)
    assert not output.exists()


def test_beams_and_length_penalty_are_the_folders_unless_others_are_asked_for(
    tmp_path: Path, model: Path, shards: str, scored: Any
) -> None:
    found, results = scored
    assert found["decoding"] == {"beam_size": 2, "max_tokens": 7, "length_penalty": 1.0, "no_repeat_trigram": True}
    greedy, results_of_greedy = score_model(
        tmp_path, model, shards, beam_size=1, against=write(tmp_path / "beams.json", results)
    )
    assert greedy["against"]["metrics"].items() <= found["metrics"].items()
    assert greedy["decoding"]["beam_size"] == 1
    assert results_of_greedy != results
    short, _ = score_model(tmp_path, model, shards, length_penalty=0.0)
    assert short["decoding"] == {"beam_size": 2, "max_tokens": 7, "length_penalty": 0.0, "no_repeat_trigram": True}
    assert short["bleu_counts"]["candidate_tokens"] < found["bleu_counts"]["candidate_tokens"]


def test_a_folder_of_before_length_penalties_takes_the_mean_step(tmp_path: Path, model: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["decoding"].pop("length_penalty")
    write(folder / "config.json", config)
    assert load_bundle(folder).decoding.length_penalty == 1.0
    config["decoding"]["length_penalty"] = "strong"
    write(folder / "config.json", config)
    with pytest.raises(UserError, match=r"config\.json"):
        load_bundle(folder)


def test_a_bundle_decodes_with_its_own_length_penalty(model: Path) -> None:
    bundle = load_bundle(model)
    views = torch.randint(0, 256, (40, 4, 4, 3)).repeat_interleave(8, 1).repeat_interleave(8, 2).byte().numpy()
    mean = caption_views(bundle, views)
    plain = caption_views(replace(bundle, decoding=replace(bundle.decoding, length_penalty=0.0)), views)
    assert sum(len(caption.tokens) for caption in plain) < sum(len(caption.tokens) for caption in mean)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path, model: Path, shards: str, scored: Any) -> None:
    torchrun = [str(Path(sys.executable).parent / TORCHRUN[0]), *TORCHRUN[1:], str(REPOSITORY / "train/evaluate.py")]
    flags = ["--model", str(model), "--shards", shards, "--batch-size", str(BATCH), "--workers", "0"]
    outputs = ["--output", str(tmp_path / "two.json"), "--json", str(tmp_path / "two-scores.json")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    done = warm.run(
        [*torchrun, *flags, *outputs],
        nested=True,
        env=environment | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    expected, results = scored
    assert json.loads((tmp_path / "two.json").read_text()) == results
    found = json.loads((tmp_path / "two-scores.json").read_text())
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
    assert done.stdout.count("cider") == 1


@pytest.fixture
def before_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path, shards: str) -> EvaluateSettings:
    """The current folder holds shards, a folder, and the results of yesterday."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shards, "shards")
    write_shards(Path("shards"), [0], split="empty")
    Path("there").mkdir()
    Path("results.json").write_text("of yesterday")
    return EvaluateSettings(model=model, shards=("shards",), workers=0)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"json": "there/"}, "--json there is a folder"),
        ({"output": "there/"}, "--output there is a folder"),
        ({"json": "results.json"}, "--json results.json is also --output"),
        ({"json": "mine.json", "output": "there/../mine.json"}, "--json mine.json is also --output"),
        ({"calibrate": True}, "--calibrate needs 100 images"),
        ({"split": "empty"}, "the empty split in shards holds no samples"),
        ({"against": "results.json"}, "--output results.json is also --against"),
        ({"against": "absent.json"}, "absent.json"),
    ],
)
def test_a_refused_evaluation_leaves_nothing_and_overwrites_nothing(
    before_evaluation: EvaluateSettings, flags: dict[str, Any], said: str
) -> None:
    before = {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file()}
    paths: dict[str, Any] = {
        name: Path(value) if name in ("json", "output", "against") else value for name, value in flags.items()
    }
    assert said in refusal(replace(before_evaluation, **paths))
    assert {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file()} == before


def test_scores_do_not_overwrite_what_is_scored(tmp_path: Path) -> None:
    results, references = write(tmp_path / "r.json", RESULTS), write(tmp_path / "c.json", coco(ANNOTATIONS))
    for path, flag in ((results, "--results"), (references, "--references")):
        settings = EvaluateSettings(results=results, references=references, json=path)
        assert f"is also {flag}" in refusal(settings)
    assert json.loads(results.read_text()) == RESULTS


def test_pictures_of_another_size_are_refused(tmp_path: Path, model: Path) -> None:
    shards = write_shards(tmp_path / "shards", [2], split="val", size=48)
    settings = EvaluateSettings(model=model, shards=(shards,), output=tmp_path / "r.json", batch_size=BATCH, workers=0)
    message = refusal(settings)
    assert "size 48 (squash)" in message
    assert "--size 40 --resize squash" in message
    assert not (tmp_path / "r.json").exists()


def test_an_absent_split_and_an_image_of_two_folders_are_refused(tmp_path: Path, model: Path, shards: str) -> None:
    settings = EvaluateSettings(model=model, shards=(shards,), output=tmp_path / "r.json", batch_size=BATCH, workers=0)
    assert "test.manifest.json (splits there: val)" in refusal(replace(settings, split="test"))
    again = write_shards(tmp_path / "again", [2], split="val", size=40, first=104)
    assert "has image 104 2 times" in refusal(replace(settings, shards=(shards, again)))
