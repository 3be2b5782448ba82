"""Score captions: a trained model's on a split of shards, or any model's from a COCO results file.

    python train/evaluate.py --model runs/coco/model --shards data/shards            # also writes results.json
    accelerate launch --config_file accelerate_config.yaml train/evaluate.py --model model --shards shards  # all GPUs
    python train/evaluate.py --results results.json --references captions_val2014.json --json scores.json
    python train/evaluate.py --results new.json --references captions_val2014.json --against old.json

    python train/evaluate.py --model runs/coco/model --shards data/shards --calibrate  # also calibrates its confidence

Figures are those of the evaluation inside training, and of the official program (coco-caption). CIDEr, BLEU-4 and
ROUGE-L have a 95 % interval over images (1,000 bootstrap resamples). --against compares another results file on the
same resampled images: each difference has such an interval, and whether it excludes 0. METEOR and SPICE need Java and
one more package: pip install -e '.[java]', then --java-metrics meteor spice.
"""

from captioner import cli
from captioner.streaming.cache import CacheFolderError, CacheTooSmallError
from train.evaluation.java_metrics import check_java
from train.evaluation.scoring import score_results
from train.evaluation.settings import EvaluateSettings, check_settings

REMEDIES: cli.Remedies = {
    CacheTooSmallError: "give more --cache-gigabytes",
    CacheFolderError: "give another --cache folder on a disk of this machine, or fewer --cache-gigabytes if it is full",
}


def main(settings: EvaluateSettings) -> None:
    """Score a results file, or caption a split and score that."""
    check_settings(settings)
    check_java(settings.java_metrics)
    if settings.scores_file:
        score_results(settings)
    else:
        from train.evaluation.model_scores import score_model
        from train.run.launch import ending_without_peers, start_accelerator

        with ending_without_peers(remedy="run the same command again"):
            score_model(settings, start_accelerator(seed=0))


def run() -> None:
    """The console entry."""
    cli.run(main, EvaluateSettings, description=__doc__ or "", remedies=REMEDIES)


if __name__ == "__main__":
    run()
