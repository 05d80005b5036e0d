"""Trainer's hyperparameter search: each trial has a new model, a new optimizer and its own settings.

The search itself runs in a stand-in backend: it draws what it is told to, and calls the trainer as the others do.
"""

from typing import ClassVar

import pytest
import transformers.integrations
from transformers import Trainer, TrainingArguments, hyperparameter_search
from transformers.trainer_utils import BestRun, HPSearchBackend

from galore_torch import GaLoreAdamW
from galore_torch.integrations.transformers import GaLoreFactory, GaLoreTrainerMixin
from tests.integrations.small_mistral import blocks, mistral

pytestmark = pytest.mark.slow

TRIALS = [
    {"learning_rate": 1e-3, "optim_args": "rank=4,update_proj_gap=2"},
    {"learning_rate": 2e-2, "optim_args": "rank=8,update_proj_gap=3"},
    {"learning_rate": 1e-5, "optim_args": "rank=2,update_proj_gap=2"},
]


class Trial:
    """What a search hands to the trainer: its number and what it has drawn."""

    def __init__(self, number):
        self.number, self.params = number, TRIALS[number]


class Backend:
    """Trains and evaluates once for each trial."""

    seen: ClassVar[list] = []

    def ensure_available(self):
        """It is."""

    def default_hp_space(self, trial):
        return trial.params

    def run(self, trainer, n_trials, direction, **_):
        runs = []
        for trial in map(Trial, range(n_trials)):
            trainer.train(trial=trial)
            made = trainer.optimizer.optimizer
            Backend.seen.append((trainer.model, made, [dict(group) for group in made.param_groups]))
            objective = trainer.compute_objective(trainer.evaluate())
            runs.append(BestRun(str(trial.number), objective, trial.params))
        return (min if direction == "minimize" else max)(runs, key=lambda run: run.objective)


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    table = {**hyperparameter_search.ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA: Backend}
    monkeypatch.setattr("transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS", table)
    monkeypatch.setattr(transformers.integrations, "hp_params", lambda trial: trial.params)
    monkeypatch.setattr(Backend, "seen", [])


class MixedIn(GaLoreTrainerMixin, Trainer):
    galore: ClassVar = {"rank": 4, "update_proj_gap": 3, "gradients": "fused"}


def by_name(args):
    args.optim, args.optim_target_modules = "galore_adamw", ["attn", "mlp"]
    return Trainer(model_init=mistral, args=args, train_dataset=blocks(), eval_dataset=blocks().select(range(8)))


def by_mixin(args):
    return MixedIn(model_init=mistral, args=args, train_dataset=blocks(), eval_dataset=blocks().select(range(8)))


@pytest.mark.learning
@pytest.mark.parametrize("make", [by_name, by_mixin])
def test_each_trial_has_its_own_optimizer_and_the_best_is_found(make, tmp_path):
    args = TrainingArguments(
        str(tmp_path), max_steps=5, save_strategy="no", use_cpu=True, report_to="none", disable_tqdm=True, seed=0
    )
    best = make(args).hyperparameter_search(n_trials=3, direction="minimize", backend="optuna")
    assert best.hyperparameters == TRIALS[1]
    for (model, made, groups), trial in zip(Backend.seen, TRIALS, strict=True):
        assert type(made) is GaLoreAdamW
        assert {id(weight) for group in groups for weight in group["params"]} == set(map(id, model.parameters()))
        assert {group["initial_lr"] for group in groups} == {trial["learning_rate"]}
        ranks = {group["rank"] for group in groups if "rank" in group}
        assert ranks == ({int(trial["optim_args"][5])} if make is by_name else {4})
        projected = [weight for group in groups if "rank" in group for weight in group["params"]]
        assert all(made.state[weight]["renewals"] >= 1 for weight in projected)
    assert len({id(made) for _, made, _ in Backend.seen}) == len({id(model) for model, *_ in Backend.seen}) == 3


def test_the_factorys_settings_are_those_of_every_trial(tmp_path):
    """Its learning rate is a keyword, so no trial changes it: search with the names or with the mixin."""
    args = TrainingArguments(
        str(tmp_path), max_steps=2, save_strategy="no", use_cpu=True, report_to="none", disable_tqdm=True
    )
    run = Trainer(
        model_init=mistral,
        args=args,
        train_dataset=blocks(),
        eval_dataset=blocks().select(range(8)),
        optimizer_cls_and_kwargs=(GaLoreFactory, {"rank": 4, "lr": 0.01, "gradients": "projected"}),
    )
    run.hyperparameter_search(n_trials=2, direction="minimize", backend="optuna")
    assert [group["initial_lr"] for *_, groups in Backend.seen for group in groups] == [0.01] * 4


@pytest.mark.learning
def test_training_twice_goes_on_with_the_same_optimizer(tmp_path):
    args = TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=0.01, save_strategy="no", use_cpu=True, report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    run = MixedIn(model=mistral(), args=args, train_dataset=blocks())
    first = run.train().training_loss
    made = run.optimizer.optimizer
    assert run.train().training_loss < first - 0.1
    assert run.optimizer.optimizer is made
