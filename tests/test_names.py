"""What is said of names that fastsmooth does not know: what other trainers call things, near
misses, and no wrong guess."""

import re

import pytest
from said import refused

from fastsmooth import train
from fastsmooth.cli.config import FIELDS, resolve
from fastsmooth.cli.facts import SETS
from fastsmooth.cli.flags import ConfigError
from fastsmooth.cli.parse import parse, parser
from fastsmooth.forms import FORMS
from fastsmooth.models import BUILDERS, ModelError, build
from fastsmooth.names import FLAGS, VALUES, about_flag, bare, hint
from fastsmooth.report import __main__ as report
from fastsmooth.schedule import METHODS
from fastsmooth.sweep import __main__ as sweep
from fastsmooth.sweep import grid

KNOWN = [name for action in parser()._actions for name in action.option_strings]
OF_THE_REPORT = [name for action in report.parser()._actions for name in action.option_strings]
# The flags of other trainers, as their programs and manuals list them.
TORCHVISION = """
    --data-path --model --device -b --batch-size --epochs -j --workers --opt --lr --momentum --wd --weight-decay --norm-weight-decay
    --bias-weight-decay --transformer-embedding-decay --label-smoothing --mixup-alpha --cutmix-alpha --lr-scheduler --lr-warmup-epochs
    --lr-warmup-method --lr-warmup-decay --lr-step-size --lr-gamma --lr-min --print-freq --output-dir --start-epoch --cache-dataset
    --sync-bn --test-only --auto-augment --ra-magnitude --augmix-severity --random-erase --amp --world-size --dist-url --model-ema
    --model-ema-steps --model-ema-decay --use-deterministic-algorithms --interpolation --val-resize-size --val-crop-size
    --train-crop-size --clip-grad-norm --ra-sampler --ra-reps --weights --backend --use-v2 --pretrained
"""
TIMM = """
    -c --config --dataset -d --train-split --val-split --dataset-download --class-map --model --pretrained --initial-checkpoint
    --no-resume-opt --num-classes --img-size --input-size --crop-pct --mean --std --interpolation -b --batch-size -vb
    --validation-batch-size --channels-last --torchscript --fuser --grad-checkpointing --opt --opt-eps --opt-betas --momentum
    --weight-decay --clip-grad --clip-mode --layer-decay --sched --lr --lr-noise --lr-noise-pct --lr-noise-std --lr-cycle-mul
    --lr-cycle-decay --lr-cycle-limit --lr-k-decay --warmup-lr --min-lr --epochs --start-epoch --decay-milestones --decay-epochs
    --warmup-epochs --cooldown-epochs --patience-epochs --decay-rate --dr --no-aug --scale --ratio --hflip --vflip --color-jitter --aa
    --aug-repeats --aug-splits --jsd-loss --bce-loss --bce-target-thresh --reprob --remode --recount --resplit --mixup --cutmix
    --cutmix-minmax --mixup-prob --mixup-switch-prob --mixup-mode --mixup-off-epoch --smoothing --train-interpolation --drop
    --drop-connect --drop-path --drop-block --bn-momentum --bn-eps --sync-bn --dist-bn --split-bn --model-ema --model-ema-force-cpu
    --model-ema-decay --seed --worker-seeding --log-interval --recovery-interval --checkpoint-hist -j --workers --amp --apex-amp
    --native-amp --pin-mem --no-prefetcher --output --experiment --eval-metric --tta --local_rank --use-multi-epochs-loader --log-wandb
"""
OTHERS = """
    --arch -a --data --learning-rate -p -e --evaluate --dist-backend --fp16 --gpu --multiprocessing-distributed --rank --eval --ema
    --milestones --nesterov --step-size --no-cuda --no-mps --dry-run --save-model --test-batch-size --ngpu --manualSeed --dataroot
    --work-dir --cutout --depth --layers --droprate --dropout --name --tensorboard --no-augment --betas --verbose --save --load --loss
    --max_epochs --max_steps --accelerator --devices --strategy --num_nodes --logger --fast_dev_run --val_check_interval
    --check_val_every_n_epoch --log_every_n_steps --accumulate_grad_batches --gradient_clip_val --benchmark --profiler
    --sync_batchnorm --default_root_dir --model_name_or_path --dataset_name --train_dir --validation_dir --do_train --do_eval
    --per_device_train_batch_size --per_device_eval_batch_size --gradient_accumulation_steps --learning_rate --adam_beta1
    --adam_epsilon --max_grad_norm --num_train_epochs --lr_scheduler_type --warmup_ratio --warmup_steps --logging_steps --save_steps
    --bf16 --tf32 --dataloader_num_workers --eval_steps --run_name --label_smoothing_factor --optim --report_to
    --resume_from_checkpoint --torch_compile --overwrite_output_dir --use_cpu --data_seed --fsdp --deepspeed
"""


def answer(flag: str) -> str:
    with pytest.raises(ConfigError) as refusal:
        parse([flag, "1"])
    return str(refusal.value)


@pytest.mark.parametrize(
    "trainer", [TORCHVISION, TIMM, OTHERS], ids=["torchvision", "timm", "others"]
)
def test_every_flag_of_another_trainer_is_one_of_ours_or_answered_without_a_guess(trainer):
    for flag in trainer.split():
        plain = flag.replace("_", "-")
        if plain not in KNOWN and flag != "-c":
            said = answer(flag)
            assert said.startswith(
                (f"unknown flag {plain}: fastsmooth calls it --", f"fastsmooth has no {plain}: ")
            ), said


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--wd", "unknown flag --wd: fastsmooth calls it --weight-decay"),
        ("--learning_rate", "unknown flag --learning-rate: fastsmooth calls it --lr"),
        ("--amp", "unknown flag --amp: fastsmooth calls it --precision bf16"),
        ("--model-ema", "unknown flag --model-ema: fastsmooth calls it --ema"),
        ("--clip-grad", "unknown flag --clip-grad: fastsmooth calls it --clip-norm"),
        ("--smoothing", "unknown flag --smoothing: fastsmooth calls it --label-smoothing"),
        ("--pretrained", "unknown flag --pretrained: fastsmooth calls it --init pretrained"),
        ("--weights", "unknown flag --weights: fastsmooth calls it --init"),
        ("--eval", "fastsmooth has no --eval: every epoch ends with a test"),
        ("--lr-milestones", "unknown flag --lr-milestones: fastsmooth calls it --milestones"),
        ("--warmup-epochs", "unknown flag --warmup-epochs: fastsmooth calls it --warmup Nep"),
        ("--warmup-lr", "fastsmooth has no --warmup-lr: --warmup N (updates) or --warmup Nep"),
        ("--early-stopping", "unknown flag --early-stopping: fastsmooth calls it --patience"),
        ("--auto-batch", "unknown flag --auto-batch: fastsmooth calls it --micro-batch auto"),
        (
            "--seeds",
            "fastsmooth has no --seeds: fastsmooth.sweep does a run for each of several seeds",
        ),
        ("--frobnicate", "unknown flag --frobnicate: --help lists the flags"),
    ],
)
def test_the_commonest_are_answered_in_words(flag, said):
    assert answer(flag).startswith(said)


def test_answers_name_flags_that_there_are_and_none_has_the_name_of_one():
    for name, said in FLAGS.items():
        assert bare(name) not in map(bare, KNOWN), f"{name} would be understood without the table"
        assert set(re.findall(r"--[a-z][\w-]*", said)) <= {*KNOWN, *OF_THE_REPORT}, said
        if re.fullmatch(r"--\S+ [a-z]\S*", said):  # a value too
            assert parse(said.replace("N", "9").split()).given, said


@pytest.mark.parametrize("flag", VALUES)
def test_answers_about_values_are_values_or_say_why_there_is_none(flag):
    choices = FIELDS[flag.removeprefix("--").replace("-", "_")].metadata["choices"]
    for name, said in VALUES[flag].items():
        assert name not in choices, name
        assert said in choices or " " in said, said
        if said.startswith("--"):
            parse(said.split())


@pytest.mark.parametrize(
    "names",
    [KNOWN, tuple(METHODS), tuple(FORMS), tuple(SETS), tuple(BUILDERS)],
    ids=lambda names: names[-1],
)
def test_a_slip_of_one_letter_is_understood_and_no_name_is_taken_for_another(names):
    """A letter left out, doubled or wrong in a name of five letters or more; the case and signs of
    any."""
    for name in names:
        bare = name.strip("-")
        assert hint(name.upper(), names) and hint(name.replace("-", "_"), names)
        if len(bare) < 5:
            continue
        for k in range(1, len(name) - 1):
            for slip in (
                name[:k] + name[k + 1 :],
                name[:k] + name[k] + name[k:],
                name[:k] + "q" + name[k + 1 :],
            ):
                if name[k].isalpha() and slip not in names:
                    assert hint(slip, names).startswith("did you mean "), (name, slip)


@pytest.mark.parametrize(
    "word", ["--augur", "--seat", "--gramma-ray", "--precious", "--helpless", "-x", "--", ""]
)
def test_what_is_like_nothing_gets_no_guess(word):
    assert not hint(word, KNOWN)


def test_another_number_is_no_slip():
    assert (
        not hint("resnet101", BUILDERS) and not hint("cifar11", SETS) and not hint("--beta2", KNOWN)
    )


def test_flags_of_other_trainers_are_answered_in_files_and_in_sweeps(tmp_path):
    (tmp_path / "f.toml").write_text("wd = 0.1")
    assert "f.toml: unknown flag --wd: fastsmooth calls it --weight-decay" in refused(
        train.main, ["--config", str(tmp_path / "f.toml")]
    )
    assert "fastsmooth has no --swa: " in refused(sweep.main, ["--out", "s", "--swa"])


def test_a_command_without_the_flag_does_not_name_it():
    assert about_flag("--wd", ["--seed", "--rho"]) == "unknown flag --wd: --help lists the flags"


# --momentum


def test_momentum_is_a_name_of_beta_everywhere(tmp_path):
    assert parse(["--momentum", "0.5"]).given == {"beta": 0.5}
    (tmp_path / "f.toml").write_text('momentum = 0.5\noptimizer = "shb"\n')
    found = resolve(parse(["--config", str(tmp_path / "f.toml")]).given)
    assert (found.beta, found.momentum, "momentum" in found.to_json()) == (0.5, 0.5, False)
    own = vars(grid.parser().parse_args(["--momentum", "0.5", "0.9", "--optimizer", "shb"]))
    assert [run.flags for run in grid.grid_runs(own, {}, tmp_path)] == [
        ("--optimizer=shb", "--beta=0.5"), ("--optimizer=shb", "--beta=0.9"),
    ]  # fmt: skip
    (tmp_path / "g.toml").write_text('optimizer = "shb"\n[[grid]]\nmomentum = [0.5, 0.9]\n')
    runs = grid.grid_runs({}, {"grid": str(tmp_path / "g.toml")}, tmp_path)
    assert [run.differs for run in runs] == [{"beta": 0.5}, {"beta": 0.9}]


def test_momentum_with_plain_sgd_names_the_optimizer_that_has_it():
    with pytest.raises(
        ConfigError,
        match=r"--beta has no effect with --optimizer sgd.*with momentum is --optimizer shb",
    ):
        resolve(parse(["--momentum", "0.9"]).given)


# Values


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--method exponential", "--method exponential: fastsmooth calls it exp"),
        ("--method Cosine", "--method Cosine: did you mean cosine?"),
        ("--method MultiStepLR", "--method MultiStepLR: fastsmooth calls it step"),
        ("--method warmup", "--method warmup: a warm-up goes with any schedule, as --warmup N"),
        ("--method linear", "--method linear: fastsmooth calls it --method poly --power 1"),
        ("--method onecycle", "--method onecycle: fastsmooth has no such schedule: choose from constant, lr"),
        ("--dataset CIFAR100", "--dataset CIFAR100: did you mean cifar100?"),
        ("--dataset cifar-10", "--dataset cifar-10: did you mean cifar10?"),
        ("--dataset ImageFolder", "--dataset ImageFolder: fastsmooth calls it folder"),
        ("--optimizer SGD", "--optimizer SGD: did you mean sgd?"),
        ("--optimizer AdamW", "--optimizer AdamW: fastsmooth calls it --optimizer torch/AdamW"),
        ("--optimizer momentum", "--optimizer momentum: fastsmooth calls it shb"),
    ],
)  # fmt: skip
def test_values_are_answered_too(argv, said):
    with pytest.raises(ConfigError) as refusal:
        parse(argv.split())
    assert str(refusal.value).startswith(said)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ResNet18", "--model ResNet18: did you mean resnet18?"),
        ("wrn28_10", "--model wrn28_10: did you mean wrn-28-10?"),
        ("resnet101", "--model resnet101: did you mean torchvision/resnet101?"),
        ("torchvision/ResNet_18", "did you mean torchvision/resnet18?"),
        ("torchvision/efficientnet-b0", "did you mean torchvision/efficientnet_b0?"),
        ("resnet9", "--model resnet9: not one of resnet8, resnet20"),
    ],
)
def test_models_are_answered_too(name, said):
    with pytest.raises(ModelError) as refusal:
        build(name, 10)
    assert said in str(refusal.value)


def test_a_model_of_timm_is_answered_too():
    pytest.importorskip("timm")
    with pytest.raises(ModelError, match=r"did you mean timm/resnet18\?"):
        build("timm/ResNet-18", 10)


# Several values


@pytest.mark.parametrize(
    ("argv", "word", "flag"),
    [
        ("--method lr batch", "batch", "--method"),
        ("--lr 0.1 0.2", "0.2", "--lr"),
        ("--lr 0.1 0.1", "0.1", "--lr"),
        ("--epochs 3 --lr=0.1 0.2 0.3 --seed 1", "0.2", "--lr"),
        ("--out batch --method lr batch", "batch", "--method"),
    ],
)
def test_several_values_name_the_sweep(argv, word, flag):
    said = refused(train.main, argv.split())
    assert said == (
        f"unexpected '{word}': {flag} takes one value; python -m fastsmooth.sweep does a run for "
        "each of several"
    )


def test_a_value_of_a_switch_is_answered_with_what_the_switch_does():
    assert refused(train.main, ["--resume", "runs/x"]) == (
        "unexpected 'runs/x': --resume takes no value: go on with the run in --out"
    )


def test_a_folder_that_no_flag_takes_is_that_of_the_images(tmp_path):
    assert f"--data-dir {tmp_path}" in refused(train.main, [str(tmp_path)])


@pytest.mark.parametrize("argv", ["--seeds 0 1 2", "--seeds 0..2+1"])
def test_seeds_with_a_list_says_what_it_wants(argv):
    said = refused(sweep.main, ["--out", "s", *argv.split()])
    assert (
        said
        == "--seeds takes one number N, for the seeds 0 to N - 1: for the seeds 0 1 2 write --seed "
        "0 1 2"
    )
