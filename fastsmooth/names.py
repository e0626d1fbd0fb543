"""What was meant by a name that fastsmooth does not know: a near miss, or what other trainers call
a thing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable

# the least similarity of a guess, by difflib: a wrong one misleads more than none helps
CLOSE = 0.8
LONGEST = 100  # letters of a word that is compared with others


def hint(word: str, known: Iterable[str], prefix: str = "") -> str:
    """ "did you mean lr?", with the prefix before the name, or nothing where no known name is so
    close that it can be said.

    Close is the same but for case and signs; or nearly the same, but for another number (resnet101
    is no slip for resnet18); or a name that begins with the word, if that has three letters, and at
    most two names do.
    """
    meant = bare(word)
    if not meant or len(word) > LONGEST:
        return ""
    plain: dict[str, str] = {}  # of names that are the same but for signs, the first
    for name in known:
        plain.setdefault(bare(name), name)
    guesses = [meant] if meant in plain else []
    if len(meant) > 2 and not guesses:
        alike = [b for b in plain if letters(b) != letters(meant)]
        cutoff = min(CLOSE, (len(meant) - 1) / len(meant))  # one letter of a short word
        guesses = difflib.get_close_matches(meant, alike, 1, cutoff)
        guesses = guesses or [b for b in plain if b.startswith(meant)]
    if not 0 < len(guesses) < 3:
        return ""
    return f"did you mean {' or '.join(prefix + plain[b] for b in guesses)}?"


def bare(name: str) -> str:
    return re.sub(r"[\W_]", "", name).casefold()


def letters(bare_name: str) -> str:
    return re.sub(r"\d", "", bare_name)


def spread(table: dict[str, str]) -> dict[str, str]:
    """The table with a row for each of the names that a row of it begins with."""
    return {name: answer for names, answer in table.items() for name in names.split()}


# What other trainers call the flags of fastsmooth.train: PyTorch's examples, torchvision's
# references, timm, Lightning, Hugging Face, MMPretrain, Keras and the published code of the papers.
# An answer that is nothing but a flag, or a flag with its value, is what fastsmooth calls it; other
# answers follow "fastsmooth has no --x:".
FLAGS = spread({
    # data
    "--data --data-path --data-root --dataset-dir --dataset-root --data-folder --train-data-dir --root --dataroot --train-dir --train-path --traindir --image-folder": "--data-dir",
    "-d --dataset-name --data-type --task": "--dataset",
    "--val-dir --val-path --valdir --validation-dir --validation-data-dir --test-dir --train-split --test-split --split": "--data-dir holds train/ and val/ (or test/), one folder a class",
    "--val-split --valid-split --val-fraction --train-val-split --validation-split --val-ratio --val-pct --val-size --valid-size --holdout": "--val-share",
    "--label-file --labels-file --label-csv --labels-csv --annotations --annotation-file --ann-file --csv-file --csv-path --metadata": "--labels",
    "--num-classes --nb-classes --n-classes --classes --class-num --num-labels --class-map": "the classes are the folders of the data set",
    "--image --imgsz --img-size --im-size --imsize --input-size --resolution --crop-size --train-crop-size --val-crop-size --val-resize-size --resize-size --crop --train-size --size": "--image-size",
    "--crop-pct --train-crop-mode --interpolation --train-interpolation --val-interpolation --mean --std --in-chans --center-crop": "test images are resized and cropped, and normalised, as --dataset and --augment say",
    "-j --num-workers --nworkers --n-workers --dataloader-num-workers --num-threads --loader-workers --nthreads --n-cpu --threads --data-workers": "--workers",
    "--pin-mem --pin-memory --no-pin-mem --persistent-workers --prefetch --prefetch-factor --no-prefetcher --use-prefetcher --use-multi-epochs-loader --dataloader-pin-memory --fast-collate --dataloader-drop-last": "loaders read ahead by themselves; --loader chooses one and --chunk what it decodes together",
    "--cache --cache-dataset --ram-cache --in-memory --use-dali --dali --ffcv --backend --use-v2": "--loader resident keeps all images on the device, --loader dali decodes with DALI",
    "--shuffle --no-shuffle --sampler --worker-seeding --weighted-sampler": "every epoch is a permutation of its own, which --seed and the epoch fix",
    "--download --dataset-download --no-download": "CIFAR's archives and torchvision's data sets are fetched into --data-dir where they are absent",
    "--aug --augmentation --data-augmentation --data-aug --transform --transforms --aug-repeats --aug-splits --ra-sampler --ra-reps --augmix-severity --color-jitter --color-jitter-prob --grayscale-prob --gaussian-blur-prob --hflip --vflip --flip --random-flip --random-crop --scale --ratio --three-augment": "--augment none, crop-flip, crop-flip-rotate or resized-crop-flip, --randaugment and --random-erasing are all that it has",
    "--auto-augment --aa --autoaugment --rand-aug --trivialaugment --ra-magnitude --ra-num-ops": "--randaugment N,M does N random operations of magnitude M on each image",
    "--reprob --random-erase --random-erase-prob": "--random-erasing",
    "--remode --recount --resplit": "--random-erasing P erases one box of an image, with probability P, to the mean of images",
    "--no-aug --no-augment --no-augmentation --no-data-aug": "--augment none",
    "--mixup-alpha": "--mixup",
    "--cutmix-alpha": "--cutmix",
    "--mixup-prob --mixup-mode --mixup-switch-prob --mixup-off-epoch --cutmix-prob --cutmix-minmax": "--mixup X and --cutmix X mix every batch with one share, with both as often one as the other",
    "--cutout --cutout-length --n-holes --length": "--random-erasing P erases a box of an image with probability P",
    # model
    "-a --arch --architecture --net --network --backbone --model-name --model-type --model-name-or-path --model-arch --depth --layers --width --widen-factor --width-factor": "--model",
    "--pretrained --from-pretrained": "--init pretrained",
    "--weights --weights-backbone --pretrained-path --pretrained-model --init-weights --initial-checkpoint --load-weights --finetune --fine-tune --init-from": "--init",
    "--no-pretrained --from-scratch --head-init-scale": "every run begins with random weights, but for what --init brings",
    "--freeze-backbone --freeze-layers --freeze-at --frozen-stages": "--freeze",
    "--dropout --drop --drop-rate --dropout-rate --drop-path --drop-path-rate --drop-connect --drop-block --droprate --stochastic-depth": "a model has the dropout that its definition gives it",
    "--norm-layer --normalization --gn --groupnorm --group-norm --use-gn": "--norm group",
    "--freeze-bn": "--freeze keeps what its patterns name, and a BatchNorm whose weight and bias are among it",
    "--bn-momentum --bn-eps --split-bn --dist-bn --bn-tf": "BatchNorm is PyTorch's default; --norm group puts GroupNorm in its place",
    "--sync-batchnorm --sync-batch-norm --use-sync-bn": "--sync-bn",
    "--channels-last --memory-format --no-channels-last": "models are in channels-last memory already",
    "--model-ema --model-ema-decay --ema-decay --use-ema --weight-averaging": "--ema",
    "--model-ema-steps --model-ema-force-cpu --model-ema-warmup --no-ema --ema-start --swa --swa-start --swa-lr --stochastic-weight-avg": "--ema X averages the weights from the first update on, on the device, and nothing is averaged without it",
    "--grad-checkpointing --gradient-checkpointing --activation-checkpointing": "--micro-batch N saves memory, N samples at a time through the model",
    # schedule
    "--learning-rate --learningrate --base-lr --initial-lr --init-lr --lr-init --start-lr --lr-base --blr --max-lr --eta --peak-lr --lr0": "--lr",
    "--bs --train-batch-size --train-batch --per-device-train-batch-size --per-gpu-train-batch-size --mini-batch-size --minibatch-size --minibatch --batch-size-train --train-bs --global-batch-size --batch-per-gpu --batch-size-per-gpu": "--batchsize",
    "--eval-batch-size --val-batch-size --test-batch-size --per-device-eval-batch-size --per-gpu-eval-batch-size --validation-batch-size --test-batch -vb --vb": "the batch size of a test changes no result and is chosen by the device",
    "--auto-scale-batch-size --auto-find-batch-size --auto-batch --batch-size-finder": "--micro-batch auto",
    "--auto-lr-find --lr-find --lr-finder": "a run has the --lr and --batchsize that it is given; fastsmooth.sweep tries several",
    "--max-epochs --num-epochs --n-epochs --nb-epochs --nepochs --num-train-epochs --total-epochs --max-epoch --epoch-num --train-epochs --num-epoch": "--epochs",
    "--max-steps --max-iters --max-iter --max-updates --max-iterations --total-steps --total-iters --num-steps --num-iters --num-iterations --iterations --iters --niter --n-iters --train-steps --num-train-steps --max-train-steps --training-steps": "--budget updates=N",
    "--batch-size-schedule --batch-schedule --bs-schedule --batch-size-scheduler --bs-scheduler --batch-ramp --batch-size-rampup --rampup-batch-size --lr-boundaries --lr-values --piecewise --lr-steps-values --schedules": "--schedule",
    "--sched --scheduler --lr-scheduler --lr-schedule --lr-sched --lr-policy --lr-scheduler-type --lr-decay-style --decay-type --lr-type --lr-strategy --anneal --annealing": "--method",
    "--cosine --cos --cosine-lr --coslr --cos-lr --cosine-annealing": "--method cosine",
    "--decay-epochs --lr-step-size --step-size --lr-decay-epochs --lr-step --lr-steps --decay-step --decay-steps --lr-decay-steps --lr-drop --decay-every --lr-decay-every": "--decay-epoch",
    "--decay-milestones --lr-milestones --lr-decay-milestones --lr-epochs": "--milestones",
    "--lr-gamma --decay-rate --lr-decay --lr-decay-rate --lr-decay-factor --dr --lrd": "--factor is that of --method step at each of --milestones, --gamma that of --method exp an epoch",
    "--lr-warmup --wu": "--warmup",
    "--warmup-epochs --warmup-epoch --lr-warmup-epochs --warm --warmup-t": "--warmup Nep",
    "--warmup-steps --warmup-iters --warmup-updates --num-warmup-steps --lr-warmup-steps --lr-warmup-iters": "--warmup N",
    "--warmup-lr --warmup-lr-init --warmup-ratio --warmup-factor --warmup-prefix --lr-warmup-method --lr-warmup-decay": "--warmup N (updates) or --warmup Nep (epochs) raises lr in a straight line from near 0",
    "--min-lr --eta-min --end-lr --final-lr --lr-end --minimum-lr --lr-final": "--lr-min",
    "--lrf --cooldown-epochs --lr-cycle-mul --lr-cycle-decay --lr-cycle-limit --lr-k-decay --lr-noise --lr-noise-pct --lr-noise-std --t-max --num-cycles": "cosine and poly fall to --lr-min over --epochs, and nothing follows",
    "--sched-on-updates --step-on-batch --per-step --interval --update-per-step": "--per update",
    "--bs-gamma --batch-size-factor --batch-growth --growth-factor --bs-growth-rate": "--factor",
    "--lr-growth-rate --lr-exp-rate": "--lr-factor",
    "--patience-epochs --early-stop --early-stopping --early-stopping-patience --es-patience": "--patience",
    "--plateau --load-best-model-at-end --metric-for-best-model": "--patience N ends a run after N epochs without a better test accuracy, and nothing else hangs on it",
    "--grad-accum-steps --grad-accum --accum --accum-iter --accumulate --accumulate-grad-batches --accumulation-steps --gradient-accumulation-steps --gradient-accumulation --update-freq --iter-size --batch-split --virtual-batch-size": "--micro-batch N puts N samples of a batch at a time through the model",
    "--poly-power --lr-power --decay-power": "--power",
    # optimizer
    "--opt --optim --optimiser --optimizer-type --optim-name --optimizer-name": "--optimizer",
    "--mu --mom --sgd-momentum --momentum-factor --opt-momentum --m": "--momentum",
    "--wd --l2 --l2-reg --l2-penalty --decay --weight-decay-rate --opt-weight-decay --reg": "--weight-decay",
    "--no-bias-decay --no-weight-decay-on-bn --filter-bias-and-bn --no-bn-wd": "--decay-weights-only",
    "--norm-weight-decay --bias-weight-decay --transformer-embedding-decay --wd-end --weight-decay-end --layer-decay --layerwise-decay": "--weight-decay is one number from first to last, and --decay-weights-only leaves norms and biases out",
    "--nesterov --use-nesterov --no-nesterov": "--optimizer nesterov",
    "--dampening --damp": "--optimizer nshb is momentum with dampening, shb without",
    "--opt-eps --opt-betas --betas --beta2 --adam-beta1 --adam-beta2 --adam-epsilon --epsilon --adam-eps --opt-args --opt-kwargs --optim-args --alpha": "--optimizer-args betas=0.9,0.95 eps=1e-6 is said to --optimizer torch/AdamW and its like",
    "--adam --adamw --lamb --lars --lion --rmsprop --use-adam --lookahead": "--optimizer torch/AdamW, timm/lamb and their like are the optimizers of PyTorch and timm",
    "--asam": "--sam rho=X is SAM, and with alpha=X GSAM",
    "--clip-grad --clip-grad-norm --clip --grad-clip --grad-clip-norm --gradient-clip --gradient-clip-val --gradient-clipping --max-grad-norm --max-norm": "--clip-norm",
    "--clip-mode --clip-value --gradient-clip-algorithm --agc": "--clip-norm X clips the norm of the whole gradient, and nothing else is clipped",
    "--label-smoothing-factor --smoothing --ls --label-smooth": "--label-smoothing",
    "--bce-loss --bce": "--loss bce",
    "--loss-fn --criterion-name --objective": "--loss",
    "--bce-target-thresh --jsd-loss --focal --temperature --distill --teacher --kd": "--loss is cross-entropy, bce or a function of your own",
    "--topk --top-k --acc5": "--top5",
    # what is done
    "-e --eval --evaluate --eval-only --evaluation --test --test-only --val --validate --validation --do-eval --do-predict --only-eval --no-eval --eval-freq --eval-every --eval-interval --eval-steps --evaluation-strategy --eval-strategy --val-interval --val-freq --val-check-interval --check-val-every-n-epoch --test-freq --eval-metric --tta --do-train --train --train-only": "every epoch ends with a test; fastsmooth.evaluate judges a saved run by any images",
    "--resume-from --resume-path --resume-from-checkpoint --resume-checkpoint --ckpt --ckpt-path --checkpoint --checkpoint-path --checkpoint-file --load --load-from --load-checkpoint --load-path --load-model --model-path --restore --restore-file --continue --continue-train --auto-resume --start-epoch --start-step --no-resume-opt --last-epoch --snapshot": "--resume --out DIR goes on with the run in DIR",
    "--overwrite --overwrite-output-dir --force --exist-ok --clean --clobber": "a run is never written over another: choose a new --out",
    "--dry-run --fast-dev-run --sanity-check --num-sanity-val-steps --summary --print-model": "--plan prints the schedule and its cost, --doctor and --check-data look at the machine and the images",
    "--debug --verbose -v --quiet -q --silent --disable-tqdm --no-progress --progress --progress-bar --enable-progress-bar --tqdm": "a terminal gets a bar, a file plain lines; --log-every sets the rows in metrics.jsonl",
    "--profile --profiler --detect-anomaly --trace": "it profiles nothing: run it under the profiler of your choice",
    # measurements and studies: flags of ours in another place
    "--sampling": "--mode sampling",
    "--critical": "--mode critical",
    "--threshold --thresholds": "--eps",
    "--n-draws --num-draws --samples --num-samples": "--draws",
    "--track --noise --noise-every --track-every --gns --gradient-noise-scale": "--track-noise",
    "--seeds --num-seeds --n-seeds --n-seed --trials --num-trials --n-trials --repeats --runs --num-runs --n-runs --repeat": "fastsmooth.sweep does a run for each of several seeds",
    "--grid --sweep --jobs --slurm --sbatch --ray --n-jobs --parallel": "fastsmooth.sweep does many runs",
    "--rho --algorithm --adaptive --sharpness": "--sam rho=X trains with SAM; fastsmooth.sharpness measures the sharpness of saved runs",
    # the run
    "-o --output --output-dir --outdir --out-dir --save-dir --savedir --save --save-path --save-model --save-model-path --log-dir --logdir --log-path --logs --results-dir --result-dir --work-dir --workdir --checkpoint-dir --ckpt-dir --default-root-dir --exp --exp-name --exp-dir --experiment --experiment-name --expname --name --run-name --tag --project-dir --logging-dir --summary-dir": "--out",
    "-p --print-freq --print-every --print-interval --log-freq --log-interval --log-steps --log-every-n-steps --logging-steps --logging-strategy --report-freq --display --verbose-step": "--log-every",
    "--save-freq --save-every --save-interval --save-steps --save-period --checkpoint-freq --checkpoint-interval --checkpoint-epochs --checkpoint-hist --ckpt-interval --save-epoch --save-strategy --save-total-limit --recovery-interval": "--checkpoint-every N saves every N updates, and the last two checkpoints are kept",
    "--random-seed --manual-seed --manualseed --seed-everything --rng-seed --data-seed --torch-seed --random-state": "--seed",
    "--use-deterministic-algorithms --deterministic-algorithms --reproducible --cudnn-deterministic --full-determinism": "--deterministic",
    "--cudnn-benchmark --benchmark --no-benchmark": "cuDNN searches for its fastest algorithm where the batch stays the same, unless --deterministic",
    "--amp --fp16 --bf16 --half --mixed-precision --mixed --native-amp --apex-amp --use-amp --amp-dtype --amp-impl --amp-level --autocast --dtype --opt-level --fp16-opt-level --bfloat16 --loss-scale --model-dtype": "--precision bf16",
    "--tf32 --allow-tf32 --float32-matmul-precision --matmul-precision": "--precision tf32",
    "--fp32 --float32 --full-precision --no-amp --no-fp16": "--precision fp32",
    "--torchcompile --torch-compile --torchdynamo --torchcompile-mode --compile-mode --torchscript --jit --aot-autograd --fuser --no-compile --compile-model": "--compile",
    "--cuda-graph --cuda-graphs --cudagraphs --cudagraph --reduce-overhead --no-cuda-graphs": "--graphs",
    "--gpu --gpus --gpu-id --gpu-ids --cuda --use-cuda --use-gpu --n-gpu --ngpu --ngpus --num-gpus --devices --device-id --device-ids --accelerator --device-modules --platform --mps --cpu --no-cuda --no-gpu --use-cpu --no-mps": "--device auto, cpu, cuda, cuda:N or mps takes one device; torchrun starts a process for each of several GPUs",
    "--world-size --rank --local-rank --dist-url --dist-backend --dist-on-itp --dist --distributed --multiprocessing-distributed --ddp --ddp-backend --use-ddp --fsdp --deepspeed --strategy --num-nodes --nnodes --nodes --num-processes --nproc-per-node --nproc --master-port --master-addr --init-method --data-parallel --dp": "torchrun starts several processes",
    "--time-limit --max-hours --max-minutes --max-seconds --walltime --timeout": "--max-time",
    "--wandb --use-wandb --log-wandb --enable-wandb --with-wandb --track-wandb": "--tracker wandb",
    "--wandb-offline --offline": "--wandb-mode offline",
    "--trackio --use-trackio --log-trackio": "--tracker trackio",
    "--tensorboard --tb --use-tensorboard --log-tensorboard --writer --tensorboard-dir --tb-dir": "--tracker tensorboard",
    "--report-to --logger --loggers --log-with --trackers": "--tracker",
    "--wandb-name --wandb-run-name --wandb-id --wandb-resume-id --wandb-group --wandb-tags --wandb-dir": "Weights & Biases gets the name of the run folder, --out",
    "--mlflow --comet --neptune --csv --log-csv": "metrics.jsonl in the run folder holds every row; --tracker sends them to wandb, trackio or tensorboard too",
    # the report
    "--live --follow --serve --server --browser --refresh --auto-refresh": "--watch",
    "--interval --poll --poll-interval --refresh-interval --reload-interval": "--every",
    "--bind --host": "--watch answers this machine alone, at --port: ssh -L brings the page elsewhere",
    "-c --cfg --config-file --config-path --cfg-path --yaml --yaml-file --params --hparams --opts --args-file": "--config",
})  # fmt: skip
# The same of the values of a flag. An answer that is no value of the flag says why there is none.
VALUES = {
    "--method": spread({
        "fixed none const": "constant",
        "steplr decay lr-decay": "lr",
        "multistep multisteplr": "step",
        "exponential exponentiallr expdecay": "exp",
        "polynomial polynomiallr": "poly",
        "linear": "--method poly --power 1",
        "cosineannealing cosine-annealing cosineannealinglr cosine-decay cosinedecay": "cosine",
        "critical": "--mode critical",
        "onecycle onecyclelr plateau reducelronplateau cyclic cosinewarmrestarts": "fastsmooth has no such schedule",
        "warmup": "a warm-up goes with any schedule, as --warmup N",
        "cosine-warmup": "a warm-up goes with any schedule, as --method cosine --warmup N",
    }),
    "--mode": spread({"train training": "normal", "sample noise": "sampling"}),
    "--optimizer": spread({
        "momentum sgdm sgd-momentum heavy-ball heavyball polyak": "shb",
        "nag sgd-nesterov": "nesterov",
        **{name.lower(): f"--optimizer torch/{name}" for name in ("Adam", "AdamW", "Adagrad", "Adadelta", "NAdam", "RAdam", "RMSprop", "Adafactor", "Adamax", "ASGD", "Rprop", "Muon")},
        **{name: f"--optimizer timm/{name}" for name in ("lamb", "lars", "lion", "adopt", "adan")},
        "sam gsam asam": "--sam rho=0.05",
    }),
    "--dataset": spread({
        "imagefolder image-folder custom dir directory": "folder",
        "imagenet1k imagenet-1k ilsvrc ilsvrc2012 ilsvrc-2012 imagenet2012": "imagenet",
        "tinyimagenet tiny-imagenet-200 tinyimagenet200": "tiny-imagenet",
        "mnist": "torchvision/MNIST",
        "fashionmnist fashion-mnist fmnist": "torchvision/FashionMNIST",
        "svhn": "torchvision/SVHN",
        "stl10 stl-10": "torchvision/STL10",
        "flowers102 flowers oxfordflowers": "torchvision/Flowers102",
        "food101": "torchvision/Food101",
        "medmnist numpy": "npz",
        "wds tar tars shards": "webdataset",
        "csv json dataframe": "table",
        "hf huggingface hugging-face": "arrow reads what datasets saved to disk, and parquet its files",
    }),
    "--norm": spread({"bn batchnorm batch-norm": "batch", "gn groupnorm group-norm": "group"}),
    "--precision": spread({
        "float32 fp-32 single full 32": "fp32",
        "bfloat16 bf16-mixed": "bf16",
        "fp16 float16 half 16 16-mixed amp": "bf16 is its half precision",
    }),
    "--augment": spread({"standard flip-crop crop flip default": "crop-flip", "imagenet inception": "resized-crop-flip", "off no": "none"}),
    "--compile": spread({"true yes 1 default": "on", "false no 0 none": "off"}),
    "--graphs": spread({"true yes 1 default": "on", "false no 0 none": "off"}),
    "--tracker": spread({"tb": "tensorboard", "weights-and-biases": "wandb", "off no false disabled": "none", "mlflow comet neptune csv": "metrics.jsonl in the run folder holds every row, for any other"}),
    "--wandb-mode": spread({"disabled none no false": "off"}),
    "--loader": spread({"dataloader pytorch pil": "torch", "memory gpu ram": "resident"}),
}  # fmt: skip


def about_flag(word: str, known: Iterable[str]) -> str:
    """What to say about a flag that is none of those known: "unknown flag --lrr: did you mean
    --lr?" or the like."""
    known = [name for name in known if name.startswith("--")]
    answer = FLAGS.get(word) or FLAGS.get(word.lower()) or ""
    other_words = bare(word) not in map(bare, known)
    # a command may be without the flags that the answer names
    has_them = set(re.findall(r"--[a-z][\w-]*", answer)) <= set(known)
    if answer and other_words and has_them:
        if re.fullmatch(r"--\S+( \S+)?", answer):
            return f"unknown flag {word}: fastsmooth calls it {answer}"
        return f"fastsmooth has no {word}: {answer}"
    return f"unknown flag {word}: {hint(word, known) or '--help lists the flags'}"


def about_value(flag: str, word: str, known: Collection[str]) -> str:
    """What to say about a value that is none of those known of the flag."""
    choices = f"choose from {', '.join(known)}"
    answer = VALUES.get(flag, {}).get(word.casefold())
    if answer in known or (answer and answer.startswith("--")):
        return f"fastsmooth calls it {answer}"
    return f"{answer}: {choices}" if answer else hint(word, known) or choices
