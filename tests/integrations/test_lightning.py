"""Lightning: automatic and manual optimization, accumulation, clipping and resumption are those of a plain loop."""

import inspect
from collections import OrderedDict

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import instantiate_class
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from galore_torch import GaLoreAdamW, attach, param_groups
from galore_torch.optim import recipes
from tests.optim.small import assert_same

BATCHES, ACCUMULATION, EPOCHS, MAX_NORM, LR = 4, 2, 3, 0.05, 0.02
pytestmark = pytest.mark.filterwarnings("ignore:.*num_workers.*", "ignore:.*litlogger.*", "ignore:rank .* saves no")
# Inside the backward nothing is left to accumulate or to clip.
FORMS = [("full", "step"), ("projected", "step"), ("fused", "step"), ("full", "backward"), ("fused", "backward")]
every_form = pytest.mark.parametrize(("gradients", "update"), FORMS, ids=[" ".join(form) for form in FORMS])


def network():
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    return nn.Sequential(OrderedDict(mlp=mlp, head=nn.Linear(16, 1))).double()


def batches():
    inputs = torch.randn(BATCHES * 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(inputs, inputs.square().mean(1, keepdim=True)), batch_size=8)


def optimizer_of(model):
    return GaLoreAdamW(param_groups(model, 4, update_proj_gap=2), lr=LR, weight_decay=0.1)


def loss_of(model, batch):
    inputs, wanted = batch
    return nn.functional.mse_loss(model(inputs), wanted)


class Learner(LightningModule):
    """The module of a reader: `attach` once all is in place, and off again when the fit is over."""

    def __init__(self, gradients, update, manual=False):
        super().__init__()
        self.network, self.form = network(), (gradients, update)
        self.automatic_optimization = not manual

    def training_step(self, batch, index):
        loss = loss_of(self.network, batch)
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss / ACCUMULATION)
        if (index + 1) % ACCUMULATION == 0:
            optimizer = self.optimizers()
            self.clip_gradients(optimizer, gradient_clip_val=MAX_NORM, gradient_clip_algorithm="norm")
            optimizer.step()
            self.lr_schedulers().step()
            optimizer.zero_grad()
        return None

    def configure_optimizers(self):
        optimizer = optimizer_of(self.network)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule(optimizer), "interval": "step"}}

    def on_fit_start(self):
        self.attached = attach(self.network, self.optimizers().optimizer, *self.form)

    def on_fit_end(self):
        self.attached.remove()


def schedule(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def trainer(folder, **given):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    settings = {"max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1, **quiet, **given}
    return Trainer(default_root_dir=folder, **settings)


def accumulating(update):
    return {"accumulate_grad_batches": ACCUMULATION, "gradient_clip_val": MAX_NORM} if update == "step" else {}


def plainly_trained(gradients, update):
    model, accumulation = network(), ACCUMULATION if update == "step" else 1
    optimizer = optimizer_of(model)
    scheduler = schedule(optimizer)
    with attach(model, optimizer, gradients, update):
        for _ in range(EPOCHS):
            for index, batch in enumerate(batches(), 1):
                (loss_of(model, batch) / accumulation).backward()
                if index % accumulation == 0:
                    if update == "step":
                        assert torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM) > MAX_NORM
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
    return model


def assert_same_weights(one, other):
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)


@every_form
@pytest.mark.broad("fused backward", "projected step")
def test_automatic_optimization_is_the_plain_loop(tmp_path, gradients, update):
    """Accumulation, clipping and schedule included; the step runs with a closure, gradients enabled anew."""
    learner = Learner(gradients, update)
    trainer(tmp_path, **accumulating(update)).fit(learner, batches())
    assert_same_weights(learner.network, plainly_trained(gradients, update))
    assert not torch.equal(learner.network.head.weight, network().head.weight)


@pytest.mark.parametrize("gradients", ["full", "projected", "fused"])
@pytest.mark.broad("fused")
def test_manual_optimization_is_the_plain_loop(tmp_path, gradients):
    learner = Learner(gradients, "step", manual=True)
    trainer(tmp_path).fit(learner, batches())
    assert_same_weights(learner.network, plainly_trained(gradients, "step"))


@every_form
@pytest.mark.broad("fused backward")
def test_a_fit_resumes_exactly(tmp_path, gradients, update):
    whole = Learner(gradients, update)
    once = trainer(tmp_path, **accumulating(update))
    once.fit(whole, batches())
    part = trainer(tmp_path, max_epochs=1, **accumulating(update))
    part.fit(Learner(gradients, update), batches())
    part.save_checkpoint(tmp_path / "part.ckpt")
    resumed = Learner(gradients, update)
    again = trainer(tmp_path, **accumulating(update))
    again.fit(resumed, batches(), ckpt_path=tmp_path / "part.ckpt", weights_only=True)
    assert_same(list(resumed.parameters()), list(whole.parameters()))
    renewals = [
        run.optimizers[0].state[learner.network.mlp[0].weight]["renewals"]
        for run, learner in ((again, resumed), (once, whole))
    ]
    assert renewals[0] == renewals[1] > 2


def test_clipping_what_the_backward_has_applied_is_told(tmp_path):
    with pytest.raises(ValueError, match=r'was applied inside the backward.*update="step"'):
        trainer(tmp_path, gradient_clip_val=1e-6).fit(Learner("full", "backward"), batches())


@pytest.mark.learning
def test_a_module_is_fitted_twice(tmp_path):
    learner = Learner("fused", "step")
    for _ in range(2):
        before = loss_of(learner.network, batches().dataset[:])
        trainer(tmp_path).fit(learner, batches())
        assert loss_of(learner.network, batches().dataset[:]) < before


# litgpt and Lightning's command line ---------------------------------------------------------------------------------

CONFIGURED = {"lr": 1e-3, "weight_decay": 0.02, "betas": [0.9, 0.95], "fused": False, "foreach": None, "amsgrad": False}


@pytest.mark.parametrize("name", recipes.__all__)
def test_what_configuration_files_say_arrives_by_signature(name):
    """litgpt keeps of its settings those that the signature names; Lightning then makes the class from its path."""
    named = inspect.signature(getattr(recipes, name)).parameters
    assert not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in named.values())
    settings = {key: value for key, value in CONFIGURED.items() if key in named}
    assert {"lr", "weight_decay"} <= set(settings)
    made = instantiate_class(param_groups(network(), 4), {"class_path": f"galore_torch.{name}", "init_args": settings})
    assert {group["weight_decay"] for group in made.param_groups} == {0.02}
    assert all(group["lr"] == 1e-3 for group in made.param_groups)
