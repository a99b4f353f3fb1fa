#!/bin/bash
# Is everything right on a CUDA device, and how fast is it there? One run of at most 8 minutes.
#
#     pip install -r requirements-dev.txt && bash tools/gpu_check.sh
#     DEVICE=cpu STEPS=2 bash tools/gpu_check.sh          # a rehearsal without one
set -euo pipefail && cd "$(dirname "$0")/.."
export DEVICE=${DEVICE:-cuda} STEPS=${STEPS:-8} OUT=${OUT:-out/gpu_check} PYTHONPATH=.:tests
rm -rf "$OUT" && mkdir -p "$OUT"
say() { echo "== $SECONDS s: $*"; }
same() {                  # one line in 100 may differ: near ties fall the other way
    other=$(diff "$1" "$2" | grep -c "^<" || true)
    echo "$other of $(wc -l <"$1") lines differ" && [ $((100 * other)) -le "$(wc -l <"$1")" ]
}

say "golden files, then every row in both dialects: $STEPS steps"
python - <<'PYTHON'
import os
from itertools import product
from types import SimpleNamespace
import torch
import config, methods, tiny, train
import test_golden as golden

device, steps = os.environ["DEVICE"], int(os.environ["STEPS"])
build, batch = golden.build, golden.batch

def moved(batch, to=device):
    return SimpleNamespace(**{name: value.to(to) if torch.is_tensor(value) else value
                              for name, value in vars(batch).items()})

def close(a, b, atol=1e-4):                        # sums in another order than the CPU's
    torch.testing.assert_close(a.cpu(), b.cpu(), atol=max(atol, 1e-4), rtol=1e-4)

golden.build, golden.close = lambda g: build(g).to(device), close
golden.batch = lambda *given: moved(batch(*given))
for test, names in ((golden.test_image_text, golden.IMAGE_TEXT), (golden.test_vlpet, golden.VLPET),
                    (golden.test_generate, golden.GENERATE)):
    for name in names:
        test(name)                                 # states, losses, gradients, decoded tokens
print(len(golden.FILES), "golden files agree")

def losses(kind, row, where, bf16):
    model = tiny.model(kind, methods.row(row, kind == "t5"), d_kv=8).to(where)     # no dropout
    optimizer, found = train.make_optimizer(model, config.Config(lr=1e-3)), []
    for _ in range(steps):
        with torch.autocast(where, torch.bfloat16, bf16):
            found.append(model.loss(moved(tiny.batch(kind), where)))
        found[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(found).detach().cpu()

rows = [(kind, row) for kind in tiny.KINDS for row in methods.methods(kind == "t5")]
for (kind, row), (bf16, rtol) in product(rows, ((False, 2e-3), (True, 0.1))):
    torch.testing.assert_close(losses(kind, row, device, bf16), losses(kind, row, "cpu", False),
                               atol=0, rtol=rtol, msg=lambda why: f"{kind} {row}: {why}")
print(len(rows), "rows learn as on the CPU, also in bf16")
PYTHON

say "a run that is stopped and resumed ends as the one that never stopped"
run="python train.py --tasks vqa --device $DEVICE --steps $((8 * STEPS)) --log-every 1"
$run --out "$OUT/whole" &>"$OUT/whole.txt"
$run --out "$OUT/resumed" &>"$OUT/resumed.txt" &
until [ "$(cat "$OUT/resumed/log.jsonl" 2>&1 | wc -l)" -ge "$STEPS" ]; do sleep 0.02; done
kill -TERM $! && ! wait $!
python train.py --resume "$OUT/resumed" --device "$DEVICE" >>"$OUT/resumed.txt" 2>&1
same "$OUT/whole/predictions/vqa.json" "$OUT/resumed/predictions/vqa.json"

say "the shipped run's answers, greedy and of 5 beams, are the CPU's"
for on in cpu "$DEVICE"; do
    python train.py --test weights/tiny-vlpet --tasks vqa,caption --device "$on" &>"$OUT/test.txt"
    rm -rf "$OUT/on-$on" && mv out/tiny-vlpet/predictions "$OUT/on-$on"
done
for task in vqa caption; do same "$OUT/on-cpu/$task.json" "$OUT/on-$DEVICE/$task.json"; done

say "the table"
more="--device cuda --precision bf16 --batch 500"
if [ "$DEVICE" = cpu ]; then more="--lm weights/tiny-bart --batch 4 --turns 1"; fi
python -m tools.bench $more --works step,beams,beams-natural --out "$OUT/bench" 2>"$OUT/bench.txt"
say "all is right"
