"""Two gloo processes give what one process gives; what cannot be shared is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from launched import in_one_and_two

SCRIPT = '''
import json, sys, warnings
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import nn

state = PartialState(cpu=True)
torch.set_num_threads(1)

import expunge as xp
from expunge.core.data import Data
from expunge.core.errors import UserError
from expunge.core.runtime import Budget, Runtime
from expunge.train.recipe import ClassifierRecipe
from expunge.workloads.digits import splits
from expunge.workloads.nets import SmallResNet

folder = Path(sys.argv[1])
everything = splits()
batch = everything.train.fetch(everything.train.ids[:301])


def mlp():
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


class Listed(torch.utils.data.Dataset):
    """The same samples through a Dataset."""

    def __len__(self):
        return len(batch)

    def __getitem__(self, index):
        return batch.x[index], int(batch.y[index])


torch.manual_seed(0)
problem = xp.Classification(mlp(), (batch.x, batch.y))
listed = xp.Classification(problem.model, Listed())
normed = xp.Classification(SmallResNet(width=4), (batch.x.view(-1, 1, 8, 8), batch.y))
request = xp.Request(label=(3,))
other = everything.train.fetch(everything.train.ids[301:402])
M = xp.methods
fitted = xp.unlearn(  # rewinding compares the errors of a model that knows its data
    problem, xp.Request(ids=(0,)), M.FineTune(epochs=10, lr=0.1), runtime=Runtime(alone=True)
).model
known = xp.Classification(fitted, (batch.x, batch.y), valid=(other.x, other.y))
shared = {"epochs": 3, "lr": 0.05, "weight_decay": 1e-3, "batch_size": 50}
# 301 samples in batches of 50: the last share of one process is often empty
runs = {
    "finetune": (problem, M.FineTune(**shared)),
    "adam": (problem, M.FineTune(**{**shared, "lr": 0.01}, step="adamw")),
    "random-label": (problem, M.RandomLabel(**shared, order="sequential")),
    "joint": (listed, M.RandomLabel(**{**shared, "batch_size": 3, "epochs": 1, "lr": 0.01}, order="joint")),
    "scrub": (problem, M.SCRUB(**shared, alpha=0.5, max_epochs=2, decay_epochs=(2,))),
    "salun": (problem, M.SalUn(**shared)),
    "influence": (problem, M.Influence(samples=35, damping=0.1, batch_size=50)),
    "influence-official": (problem, M.Influence(mode="official", scale=35)),
    "rewind": (known, M.SCRUB(**{**shared, "epochs": 6, "lr": 0.01}, alpha=0.5, max_epochs=6, rewind=True,
                              decay_epochs=())),
    "unsir": (problem, M.UNSIR(copies=2, noise_steps=3, noise_size=8, lr=1e-3)),
    "normed": (normed, M.SCRUB(**{**shared, "epochs": 2}, alpha=0.5, norm="frozen")),
}
notes = {"processes": Runtime().processes}
for name, (of, method) in runs.items():
    outcome = xp.unlearn(of, request, method, runtime=Runtime(seed=4))
    if state.is_main_process:
        tensors = {k: v.contiguous() for k, v in outcome.model.state_dict().items()}
        save_file(tensors, folder / f"{name}.safetensors")
        notes[name] = {
            "loss": [p["loss"] for p in outcome.curve],
            "samples": outcome.cost.samples,
            "gradients": outcome.cost.gradients,
            "errors": outcome.details.get("forget_errors"),
        }
    # every process ends with the same weights
    total = sum(p.double().sum() for p in outcome.model.parameters()).detach()
    mine = total.clone()
    Runtime().sum(total)
    assert abs(float(total) / Runtime().processes - float(mine)) < 1e-9, name

timed = xp.unlearn(
    problem, request, M.FineTune(epochs=10**6, lr=0.01), runtime=Runtime(budget=Budget(seconds=0.3))
)
notes["timed"] = timed.details["stopped"]
for norm in ("train", "recalibrate"):
    try:
        xp.unlearn(normed, request, M.FineTune(epochs=1, norm=norm), runtime=Runtime())
        notes[norm] = "ran"
    except UserError as error:
        notes[norm] = str(error)
if state.is_main_process:
    (folder / "notes.json").write_text(json.dumps(notes))
state.wait_for_everyone()
if state.num_processes > 1:
    torch.distributed.destroy_process_group()
'''

METHODS = (
    "finetune",
    "adam",
    "random-label",
    "joint",
    "scrub",
    "salun",
    "influence",
    "influence-official",
    "rewind",
    "unsir",
    "normed",
)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("processes")
    return in_one_and_two(SCRIPT, root)


def notes(folder: Path) -> dict:
    return json.loads((folder / "notes.json").read_text())


def test_the_launch_really_had_two_processes(outputs):
    assert notes(outputs[1])["processes"] == 1
    assert notes(outputs[2])["processes"] == 2


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_give_the_weights_of_one(outputs, name):
    one, two = (load_file(outputs[n] / f"{name}.safetensors") for n in (1, 2))
    assert one.keys() == two.keys()
    for key in one:
        difference = float((one[key].double() - two[key].double()).abs().max())
        assert difference <= 1e-5, f"{key}: {difference}"


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_report_the_losses_of_one(outputs, name):
    one, two = (notes(outputs[n])[name] for n in (1, 2))
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_every_sample_and_gradient_is_counted_once_over_all_processes(outputs, name):
    one, two = (notes(outputs[n])[name] for n in (1, 2))
    assert one["samples"] == two["samples"]
    assert one["gradients"] == two["gradients"]


def test_two_processes_rewind_by_the_errors_of_all_samples(outputs):
    one, two = (notes(outputs[n])["rewind"]["errors"] for n in (1, 2))
    assert one == two and len(set(one)) > 2


def test_a_time_budget_stops_all_processes_together(outputs):
    assert notes(outputs[2])["timed"] == "budget of 0.3 s used"


def test_shared_batch_statistics_are_refused(outputs):
    refused = notes(outputs[2])
    for norm in ("train", "recalibrate"):
        assert refused[norm] == (
            "batch statistics cannot be shared between processes; "
            "use norm=frozen with several processes"
        )
        assert notes(outputs[1])[norm] == "ran"
