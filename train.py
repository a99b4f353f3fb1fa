"""How is a method trained and tested?

One visible loop (VL-Adapter, section 4; VL-PET, section 4): tasks are mixed in proportion to their
size, a batch belongs to one task, only what the method's row installs or opens is trained.

    python train.py                                  # vlpet-large on the built-in data, minutes
    python train.py --method adapter --seed 43       # another row, another seed
    python train.py --resume out/vlpet-large         # go on after an interruption, exactly
    python train.py --test out/vlpet-large           # load the adapter-only file, test again
    python -m pytest tests/test_train.py
"""
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import config as configs
import data
import methods
from answers import AnswerHead
from config import WORLD, Config, shows_clips, task_list
from data import TASKS, Example
from model import VLModel, vocabulary
from support import features, published_lm, ranks, resume, runs, submit, weights
from support.gate import BadInput, program, reading
from support.runs import ADAPTER, Run
from support.tokenizer import load_tokenizer
from world import moving, scenes

Examples = dict[str, list[Example]]                         # by task


# ------------------------------------------------------------------------------- what is needed

def setup(config: Config, held: weights.Tensors | None = None,
          pictures: dict[str, Path] | None = None,
          choices: dict[str, list[str]] | None = None) -> Run:
    """The frozen language model with the method installed, its tokenizer and features.

    held: the adapter file that it will load, which may know more tasks, widths of features and
    answers than are shown now. pictures: these (id -> file), not those of the configuration.
    choices: task -> its answers, where they are chosen.
    """
    # The language model is frozen. Without a decoder, its answers are chosen.
    lm = published_lm.load_lm(config.lm, config.dropout, writes=not config.answers)
    tokenizer = load_tokenizer(config.lm)
    with reading(config.lm):
        assert len(tokenizer) <= lm.config.vocab, (
            f"its tokeniser has ids up to {len(tokenizer) - 1}, its weights {lm.config.vocab} rows")
        assert lm.grid is None or config.boxes == "grid" and not config.train_clip, \
            "CLIP-ViL's grid needs --boxes grid, and --train-clip no"

    # What there is to see: CLIP's features, packed once, or pictures as they are.
    tasks, before = task_list(config), {}
    if held is not None:
        with reading(config.out):
            choices = json.loads(held.metadata.get("answers", "{}"))
            tasks = json.loads(held.metadata["config"])["tasks"].split(",")
            before = json.loads(held.metadata.get("features", "{}")).get("pictures", {})
    packed = features.load_features(config, lm.grid is not None, pictures,
                                    before.get("resize", "stretch"))
    widths = [source["width"] for source in features.sources(packed).values()]
    if held is not None:
        widths = runs.widths(held)
    tower = None
    if config.train_clip:                                   # CLIP runs in the model, in each step
        tower = next(iter(packed.values())).tower

    # Rows for the added tokens. Everything that is drawn from here on (the visual embedding, the
    # row's modules) depends on the seed alone.
    torch.manual_seed(config.seed)
    if config.control == "random-lm":
        lm.init_weights()
    lm.resize(vocabulary(lm.config))
    heads = {task: AnswerHead(lm.config.d, lm.config.eps, listed, TASKS[task].answers)
             for task, listed in (choices or {}).items()}
    model = VLModel(lm, widths, tower, heads)
    if lm.grid is not None:
        published_lm.begin_clip_vil(model.visual, model.answers, config.lm)
    if config.pretrained:
        runs.begin_pretrained(model, config)

    # The method: a row of the table, installed at its sites.
    method = methods.row(config.method, lm.config.is_t5, config.set)
    if config.train_clip:
        method = replace(method, open=(*method.open, "clip"))
    identity = runs.identity(lm, config, method, choices)   # before anything is installed in it
    with reading(f"--method {config.method} --set {config.set}"):
        model.install(method, tuple(tasks))
    run = Run(config, model, tokenizer, packed, identity)
    model.to(run.device)
    lm.checkpoint = config.checkpoint
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    if config.precision == "bf16":
        model.keep_frozen_in(torch.bfloat16)
    return run


def load_split(config: Config, split: str) -> Examples:
    """The examples of every task; of split submit, of the tasks that have one."""
    if config.data == WORLD:                                # written where it is missing
        scenes.write(WORLD)
        if shows_clips(config):
            moving.write(WORLD)
    examples = {}
    for task in task_list(config):
        try:
            examples[task] = data.load_examples(task, split, config.data, config.subtitles)
        except BadInput as why:
            if split != "submit":
                raise
            print(f"{task} is left out: {why}")
    with reading(config.data):
        assert examples, "no task has questions to submit answers for"
    if config.control == "no-subtitles":
        for task, found in examples.items():
            examples[task] = [replace(example, context="") for example in found]
    return examples


def check_examples(run: Run, examples: Examples) -> None:
    """Every picture must be there, the longest texts must fit: better said now than in training."""
    config, c = run.config, run.model.lm.config
    room = (c.positions or 10**9) - c.unused                # T5's positions are relative
    features.check_pictures(config, examples, run.features)
    for task, found in examples.items():
        for example in max(found, key=lambda ex: len(ex.text)), max(found, key=data.length):
            with reading(task, example.id):
                length = len(data.text_ids(example, run.tokenizer, config.task_names))
                assert length <= room, \
                    f"its text takes {length} tokens of {room} positions: take another --lm"


# ------------------------------------------------------------------------------- the loop

def make_optimizer(model: VLModel, config: Config) -> torch.optim.AdamW:
    """AdamW that decays matrices only (the papers' code decays norm weights too, by mistake)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999), eps=1e-6)


def learning_rate(step: int, total: int, config: Config) -> float:
    """Linear warm-up from 0 over the first `warmup` of all steps, then linear to 0."""
    warm = int(total * config.warmup)
    share = step / warm if step < warm else (total - step) / max(1, total - warm)
    return config.lr * share


def autocast(run: Run):
    return torch.autocast(run.device, torch.bfloat16, enabled=run.config.precision == "bf16")


def collate(run: Run, examples: list[Example], seed_key: tuple | None = None,
            share: slice = slice(None)) -> data.Batch:
    """The batch of examples of one task, or a share of it, on the device."""
    c, task = run.config, examples[0].task
    head = run.model.answers[task] if c.answers else None
    batch = data.collate(examples, run.tokenizer, run.features[task], task_names=c.task_names,
                         boxes=c.boxes, frames=c.frames, seed_key=seed_key, head=head, share=share)
    return batch.to(run.device)


def fetch(run: Run, examples: Examples, plan: list, epoch: int) -> Iterator[tuple]:
    """Of each batch of the plan: its task, its examples, and this rank's shares of it, collated. A
    thread does so while the step before it computes: the loop does not wait for data."""
    def make(task: str, chosen: list[int]) -> tuple[str, list[Example], list[data.Batch]]:
        # A batch belongs to one task; its answers are drawn by (seed, epoch, question).
        asked, key = [examples[task][i] for i in chosen], (run.config.seed, epoch)
        shares = ranks.shares(run.config.accumulate)        # usually one, the whole batch
        return task, asked, [collate(run, asked, key, share) for share in shares]

    packed = all(isinstance(source, features.Features) for source in run.features.values())
    if run.device == "cpu" and not packed:                  # CLIP runs in each step, on all cores
        for task, chosen in plan:
            yield make(task, chosen)
        return
    with ThreadPoolExecutor(1, initializer=ranks.start_thread) as thread:
        ahead = thread.submit(make, *plan[0])
        for following in plan[1:]:
            now, ahead = ahead, thread.submit(make, *following)
            yield now.result()
        yield ahead.result()


def total_steps(config: Config, examples: Examples) -> int:
    return config.steps or config.epochs * data.steps_per_epoch(examples, config.batch)


def check_finite(step: int, asked: list[Example], loss: Tensor, norm: Tensor) -> None:
    """NaN would reach every weight: better stop before the step. last/ stays good."""
    with reading(f"step {step}, {asked[0].task}"):
        assert norm.isfinite(), (
            f"the loss is {loss:.3g}, its gradient's norm {norm:.3g}: try a smaller --lr, or look "
            f"at the features of {[ex.id for ex in asked]!s:.300}")


def loss_function(run: Run) -> Callable[[data.Batch], Tensor]:
    """The model's loss; with --compile, a graph a task and size of its batches."""
    if not run.config.compile:
        return run.model.loss
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(run.model.loss, fullgraph=True)


def train(run: Run, examples: Examples, vals: Examples, stop: resume.Stop, again: bool) -> None:
    """Leaves in adapter.safetensors what was trained: last epoch or best one (--keep)."""
    # The model is in place. Now its optimiser, and where an interrupted run was.
    config, model = run.config, run.model
    optimizer, log = make_optimizer(model, config), resume.Log(run.folder / "log.jsonl")
    per_epoch, total = data.steps_per_epoch(examples, config.batch), total_steps(config, examples)
    step = 0
    if again:
        step = resume.load_last(run, optimizer, total, log)
    else:
        resume.save_last(run, optimizer, step, log)
        runs.save_json(run.folder / "config.json", asdict(config))      # now it can be resumed
    log.open(step)
    loss_of = loss_function(run)
    bar = tqdm(total=total, initial=step, desc=f"train {config.method}", disable=not ranks.FIRST)

    while True:
        epoch, done = divmod(step, per_epoch)

        # evaluate, after every epoch (where there are several), unless a resumed run has done it
        if vals and step and (done == 0 or step == total) and step not in log.scores:
            line = {"step": step, "epoch": (step - 1) // per_epoch} | validate(run, vals)
            runs.keep_best(run, line, log.scores)
            log.put(line)
        if step == total:
            break
        model.train()                                       # frozen layers keep their dropout
        plan = list(data.batches(examples, config.batch, epoch, config.seed))
        stop.held = True                                    # a signal waits for the end of a step
        left = plan[done:done + total - step]               # after a resume: what is left
        for task, asked, shares in fetch(run, examples, left, epoch):

            # schedule: linear warm-up, then linear to zero
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total, config)

            # forward and backward: gradients of the shares add up to those of the batch
            ranks.seed_dropout(config.seed, step)
            losses = []
            for batch in shares:
                with autocast(run):
                    loss = loss_of(batch)
                loss.backward()
                losses.append(loss.detach())
            loss, stopped = ranks.add_up(model, sum(losses), stop.asked)

            # clip: a fresh visual embedding can make a first gradient huge
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            check_finite(step + 1, asked, loss, norm)

            # step; gradients are dropped, not zeroed: AdamW would move idle tasks' modules
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            bar.update()

            # log
            log.add(task, loss)
            if step % config.log_every == 0 or step == total:
                line = {"step": step, "epoch": epoch, "lr": optimizer.param_groups[0]["lr"],
                        "grad_norm": norm.item(), "loss": log.means()}
                log.put(line)
                bar.set_postfix(line["loss"])

            # save, here or, after an epoch or a signal, outside the loop
            if stopped:
                stop.asked = True                           # by another rank, perhaps
                break
            if step % config.save_every == 0:
                resume.save_last(run, optimizer, step, log)
        resume.save_last(run, optimizer, step, log)
        stop.release()
    bar.close()
    runs.finish(run, log.scores)


# ------------------------------------------------------------------------------- the test

def choice_tokens(tokenizer) -> list[int]:
    """The first tokens of "false" and "true" (after <s>, where there is one)."""
    first = 0 if tokenizer.bos_id is None else 1
    return [tokenizer.encode(answer)[first] for answer in data.ANSWERS]


def answer_text(tokenizer, ids: list[int]) -> str:
    """Text of generated ids; the rows behind the tokenizer's own (added tokens) have none."""
    return tokenizer.decode([i for i in ids if i < len(tokenizer)])


@torch.no_grad()
def predict(run: Run, examples: list[Example]) -> list[str]:
    """One answer an example of a task, decoded as it asks (data.TASKS)."""
    model, task, answers = run.model.eval(), examples[0].task, {}
    size = 2 * data.batch_size(task, run.config.batch)
    examples = examples[ranks.RANK::ranks.WORLD]
    # Texts of one length share a batch: less padding to decode over.
    order = sorted(range(len(examples)), key=lambda i: data.length(examples[i]))
    for start in tqdm(range(0, len(order), size), f"test {task}", leave=False,
                      disable=not ranks.FIRST):
        chosen = order[start:start + size]
        batch = collate(run, [examples[i] for i in chosen])
        with autocast(run):
            if run.config.answers:                          # the likeliest of all that are known
                best, known = model(batch).argmax(-1).tolist(), model.head(batch).vocabulary
                texts = [known[i] for i in best]
            elif TASKS[task].decode == "choice":            # nlvr: which of the two is likelier?
                best = model.choose(batch, choice_tokens(run.tokenizer)).argmax(-1).tolist()
                texts = [data.ANSWERS[i] for i in best]
            else:
                beams = run.config.beams if TASKS[task].decode == "beam" else 1
                ids = model.generate(batch, beams).tolist()
                texts = [answer_text(run.tokenizer, row) for row in ids]
        answers |= zip(chosen, texts)
    return ranks.gather([answers[i] for i in range(len(examples))])


def test(run: Run, examples: Examples, split: str = "test") -> dict:
    """Scores of each task, and their average ("submit" has none); writes what was answered."""
    results = {}
    for task, asked in examples.items():
        answers = predict(run, asked)
        if split != "submit":
            results[task] = TASKS[task].metric(answers, asked)
        told = [{"id": x.id, "answer": a} for x, a in zip(asked, answers)]
        form = TASKS[task].submit
        try:
            path = run.folder / "predictions" / f"{submit.plain_name(task, split)}.json"
            runs.save_json(path, told)
            if form is not None:                            # as the task's server takes them
                path = run.folder / "submissions" / form.name(task, split)
                submit.write(task, form, answers, asked, path)
        except (BadInput, OSError) as why:                  # ids of one's own, a full disk
            print(f"answers are not kept: {why}")           # the scores are not lost
    if results:
        headlines = [next(iter(scores.values())) for scores in results.values()]
        results["average"] = sum(headlines) / len(headlines)
    return results


def validate(run: Run, examples: Examples) -> dict:
    """{"validation": a headline a task, "mean": their mean}."""
    found = {}
    for task, asked in examples.items():
        scores = TASKS[task].metric(predict(run, asked), asked)
        found[task] = next(iter(scores.values()))
    return {"validation": found, "mean": sum(found.values()) / len(found)}


# ------------------------------------------------------------------------------- command line

def announce(run: Run, examples: Examples) -> None:
    """What is about to be trained, for how long; and what a user would wonder about later."""
    c, total = run.config, total_steps(run.config, examples)
    row, epoch = f"{c.method} {c.set}".rstrip(), data.steps_per_epoch(examples, c.batch)
    print(f"{row}: lr {c.lr}, batch {c.batch}, task names {c.task_names}")
    print(f"{'part':18}{'trainable':>12}{'total':>12}{'%':>9}")
    for part, opened, every in run.model.counts():
        print(f"{part:18}{opened:12,}{every:12,}{100 * opened / max(1, every):9.4f}")
    for task, found in examples.items():
        size = data.batch_size(task, c.batch)
        more = " (more than a tenth: try a smaller --batch)" if size > len(found) / 10 else ""
        print(f"{task}: {len(found):,} examples, {size} a batch{more}")
    more = ", too few to learn from: give more --steps or --epochs" if 0 < total < 100 else ""
    print(f"{epoch:,} steps an epoch, {total:,} in all{more}")


def load_tests(config: Config, split: str) -> tuple[Examples, str]:
    """The examples of a split to score, or of val where the answers of test are not public."""
    try:
        return load_split(config, split), split
    except data.Unanswered as why:
        print(f"{why} The validation split is scored instead; for their server: --split submit")
    return load_split(config, "val"), "val"


def train_run(config: Config, again: bool = False) -> dict:
    """Trains, then tests. The run folder is made when all that it needs is found and read."""
    started, vals = time.time(), {}
    resume.check_folder(config.out, again)
    with ranks.first_goes_first():
        examples = load_split(config, "train")
        if total_steps(config, examples) > data.steps_per_epoch(examples, config.batch):
            vals = load_split(config, "val")                # several epochs: a score after each
        tests, split = load_tests(config, "test")
        run = setup(config, choices=runs.choices(config, examples))
    for split_examples in examples, vals, tests:
        check_examples(run, split_examples)
    run.identity |= {"training data": runs.data_identity(examples),
                     "features of the first examples": runs.features_identity(run, examples),
                     f"{split} data": runs.data_identity(tests)}
    announce(run, examples)
    if config.init and not again:
        runs.begin_with(run)
    with resume.alone(run, again) as stop:
        train(run, examples, vals, stop, again)
        results = test(run, tests, split)
        runs.report(run, results, split, time.time() - started, save=True)
    runs.draw_page(run)
    return results


def test_run(config: Config, split: str = "test", given: tuple[str, ...] = ()) -> dict:
    """Tests what a run trained, as it was then. given: settings that are not the run's own."""
    started, adapter = time.time(), Path(config.out) / ADAPTER
    with reading(config.out):
        assert adapter.exists(), "this run is not finished: go on with python train.py --resume RUN"
    held = runs.read(adapter)
    with ranks.first_goes_first():
        tests, split = load_tests(config, split)
        run = setup(config, held)
    check_examples(run, tests)
    if not {"data", "tasks"} & set(given):
        run.identity[f"{split} data"] = runs.data_identity(tests)
    runs.load_trained(run, held, adapter, given)
    if not (run.folder / "last").is_dir():                  # a shipped run stays as it is
        run.config = replace(config, out=f"out/{run.folder.name}")
    results = test(run, tests, split)
    print(f"answers are in {run.folder}")
    if results:
        runs.report(run, results, split, time.time() - started)
    return results


@program
def main(argv: list[str] | None = None) -> None:
    config, args = configs.parse(argv)
    if args.test or args.resume:
        config = runs.read_config(args.test or args.resume, **args.given)
    else:
        config = configs.resolve(config)
    ranks.start(features.default_device(config.device))
    if args.test:
        test_run(config, args.split, tuple(args.given))
    else:
        train_run(config, again=bool(args.resume))


if __name__ == "__main__":
    main()
