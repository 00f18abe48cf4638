"""Defaults of `MMTrainingArguments`, and what they become once it is known whether there are validation rows."""

import dataclasses
import json
import re

import pytest
from transformers import Seq2SeqTrainingArguments

from mm_transformers import MMTrainingArguments
from mm_transformers.training.learning_rates import learning_rates


CPU = {"use_cpu": True, "report_to": []}


def settled(has_validation, **given):
    args = MMTrainingArguments("out", **CPU, **given)
    args.settle(has_validation)
    return args


def strategies(args):
    return args.eval_strategy.value, args.save_strategy.value, args.load_best_model_at_end


def test_without_validation_rows_only_checkpoints_are_left():
    assert strategies(settled(False)) == ("no", "epoch", False)


def test_with_validation_rows_the_best_epoch_is_kept():
    args = settled(True)
    assert strategies(args) == ("epoch", "epoch", True)
    assert (args.metric_for_best_model, args.greater_is_better) == ("loss", False)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"eval_strategy": "no"}, ("no", "epoch", False)),
        ({"save_strategy": "no"}, ("epoch", "no", False)),
        ({"save_strategy": "best"}, ("epoch", "best", True)),
        ({"eval_strategy": "steps", "eval_steps": 7}, ("steps", "steps", True)),
        ({"save_strategy": "steps", "save_steps": 7}, ("steps", "steps", True)),
        ({"save_steps": 7}, ("steps", "steps", True)),
        ({"eval_steps": 7}, ("steps", "steps", True)),
        ({"eval_strategy": "epoch", "save_strategy": "steps"}, ("epoch", "steps", False)),
        ({"load_best_model_at_end": False}, ("epoch", "epoch", False)),
        ({"load_best_model_at_end": True}, ("epoch", "epoch", True)),
    ],
)
def test_what_a_user_gives_stays_and_the_rest_fits_to_it(given, expected):
    args = settled(True, **given)
    assert strategies(args) == expected
    for name, value in given.items():
        found = getattr(args, name)
        assert getattr(found, "value", found) == value
    if expected[:2] == ("steps", "steps"):
        assert args.eval_steps == args.save_steps == 7


def test_several_validation_sets_have_no_loss_that_could_choose():
    args = MMTrainingArguments("out", **CPU)
    args.settle(True, has_one_loss=False)
    assert strategies(args) == ("epoch", "epoch", False)
    args = MMTrainingArguments("out", **CPU, metric_for_best_model="eval_a_topic_f1")
    args.settle(True, has_one_loss=False)
    assert strategies(args) == ("epoch", "epoch", True)


def test_streams_are_saved_by_steps():
    args = MMTrainingArguments("out", **CPU, max_steps=1000)
    args.settle(False, has_epochs=False)
    assert strategies(args) == ("no", "steps", False)
    args = MMTrainingArguments("out", **CPU, max_steps=1000)
    args.settle(True, has_epochs=False)
    assert strategies(args) == ("steps", "steps", True)
    assert args.eval_steps == args.save_steps == 500


def test_checkpoints_are_deleted_only_where_nothing_is_said_of_them():
    assert settled(True).save_total_limit == 1
    assert settled(True, save_steps=7).save_total_limit is None
    assert settled(True, save_total_limit=4).save_total_limit == 4


def test_a_metric_that_is_given_stays():
    args = settled(True, metric_for_best_model="eval_topic_f1")
    assert args.metric_for_best_model == "eval_topic_f1"
    assert args.greater_is_better


def test_all_other_defaults_are_those_of_transformers():
    ours, theirs = MMTrainingArguments("out", **CPU), Seq2SeqTrainingArguments("out", **CPU)
    own = set(MMTrainingArguments.__annotations__) | {"do_eval", "save_total_limit"}
    changed = [
        f.name
        for f in dataclasses.fields(theirs)
        if f.name not in own and f.init and getattr(ours, f.name) != getattr(theirs, f.name)
    ]
    assert [name for name in changed if name not in ("logging_dir", "accelerator_config", "run_name")] == []


def test_arguments_are_json_and_can_be_copied():
    args = settled(True, encoder_learning_rate=1e-5)
    values = json.loads(args.to_json_string())
    assert values["eval_strategy"] == "epoch"
    assert values["encoder_learning_rate"] == 1e-5
    copy = dataclasses.replace(args, num_train_epochs=3)
    assert copy.num_train_epochs == 3


def test_copies_stay_automatic_and_keep_what_is_given():
    args = settled(True, num_train_epochs=2)
    for copy in (dataclasses.replace(args, output_dir="b"), MMTrainingArguments(**args.to_dict())):
        assert copy.wants_validation_rows
        copy.settle(False)
        assert strategies(copy) == ("no", "epoch", False)
        model_rate = learning_rates_of(copy)
        assert model_rate == {"encoder": 5e-5, "head": pytest.approx(1e-3)}
    given = dataclasses.replace(args, eval_strategy="steps", eval_steps=3, learning_rate=1e-3)
    given.settle(True)
    assert strategies(given) == ("steps", "steps", True)
    assert learning_rates_of(given) == {"encoder": 1e-3, "head": 1e-3}


def learning_rates_of(args):
    from tiny import make_model

    model = make_model()
    rates = learning_rates(model, args, args.learning_rate)
    return {
        "encoder": rates[id(next(model.model.text_model.parameters()))],
        "head": rates[id(next(model.heads.parameters()))],
    }


def test_the_same_arguments_serve_a_second_trainer():
    args = settled(True)
    args.reopen()
    assert strategies(args) == ("no", "epoch", False)
    args.settle(True)
    assert strategies(args) == ("epoch", "epoch", True)


@pytest.mark.parametrize(
    "given",
    [
        {"load_best_model_at_end": True},
        {"load_best_model_at_end": True, "save_strategy": "best"},
        {"load_best_model_at_end": True, "eval_steps": 300},
        {"eval_steps": 100},
    ],
)
def test_options_that_go_together_are_not_refused_before_the_rows_are_known(given):
    args = settled(True, **given)
    assert args.load_best_model_at_end
    assert all(getattr(getattr(args, name), "value", getattr(args, name)) == value for name, value in given.items())


def test_the_best_of_nothing_is_told():
    with pytest.raises(ValueError, match="load_best_model_at_end=True needs validation rows"):
        settled(False, load_best_model_at_end=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"validation_fraction": 1.0}, "validation_fraction must be at least 0 and less than 1, but is 1.0."),
        ({"early_stopping_patience": -1}, "early_stopping_patience must be at least 0, but is -1."),
        ({"head_learning_rate": -1.0}, "head_learning_rate must be at least 0, but is -1.0."),
    ],
)
def test_values_out_of_range_are_told(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MMTrainingArguments("out", **CPU, **given)


def test_a_search_that_tries_learning_rates_tries_them_for_all_parts():
    from tiny import make_model

    model = make_model()
    args = MMTrainingArguments("out", **CPU)
    by_default = learning_rates(model, args, args.learning_rate)
    assert len({by_default[id(p)] for p in model.model.text_model.parameters()}) == 1
    assert by_default[id(next(model.model.text_model.parameters()))] < args.learning_rate
    args.learning_rate = 7e-4  # as `hyperparameter_search` does
    tried = learning_rates(model, args, args.learning_rate)
    assert {tried[id(p)] for p in model.model.text_model.parameters()} == {7e-4}
