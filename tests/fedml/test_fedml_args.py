"""From FedML's arguments to an experiment; needs no FedML."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fedml_plugin_fedmosaic.core.errors import ConfigError, IntegrationError
from fedml_plugin_fedmosaic.integrations.fedml.args import (
    experiment_from_args,
    fill_args,
    refuse_unsupported,
)

YAML = """\
common_args: {random_seed: 3}
train_args: {federated_optimizer: FedMosaic, comm_round: 4}
dp_args: {enable_dp: true, epsilon: 0.25, delta: 1e-5}
"""


@pytest.fixture
def args(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(YAML)
    # FedML's reader takes 1e-5 for text, and adds values of its own.
    return SimpleNamespace(
        yaml_config_file=str(path),
        federated_optimizer="FedMosaic",
        random_seed=3,
        comm_round=4,
        enable_dp=True,
        epsilon=0.25,
        delta="1e-5",
        training_type="simulation",
        backend="sp",
        rank=0,
        config_version="release",
        using_mlops=False,
    )


def test_the_file_is_the_experiment(args):
    experiment = experiment_from_args(args)
    assert (experiment.algo, experiment.train.comm_round) == ("fedmosaic", 4)
    assert experiment.common.random_seed == 3
    assert experiment.dp.delta == 1e-5


def test_what_the_main_program_changed_wins(args):
    args.comm_round = 2
    args.random_seed = 0
    args.delta = "1e-6"
    args.backend = "MPI"
    experiment = experiment_from_args(args)
    assert experiment.train.comm_round == 2
    assert experiment.common.random_seed == 0
    assert experiment.dp.delta == 1e-6
    assert experiment.comm.backend == "MPI"


def test_another_algorithm_of_ours(args):
    args.federated_optimizer = "Local"
    assert experiment_from_args(args).algo == "local"


def test_a_wrong_change_is_refused_with_its_name(args):
    args.comm_round = 0
    with pytest.raises(ConfigError, match="comm_round"):
        experiment_from_args(args)


def test_a_file_that_is_not_there(args):
    args.yaml_config_file = "no/such.yaml"
    with pytest.raises(ConfigError, match=r"no/such\.yaml"):
        experiment_from_args(args)


def test_missing_keys_are_filled_in_and_others_kept(args):
    args.gpu_id = 5
    experiment = experiment_from_args(args)
    assert experiment.device.gpu_id == 5
    fill_args(args, experiment)
    assert args.using_gpu is False
    assert args.gpu_id == 5
    assert args.config_version == "release"


@pytest.mark.parametrize("switch", ["enable_fhe", "enable_defense", "enable_tracking"])
@pytest.mark.parametrize("value", [True, "true", 1])
def test_switches_that_must_be_off(args, switch, value):
    setattr(args, switch, value)
    with pytest.raises(ConfigError, match=f"{switch} must be false"):
        refuse_unsupported(args)


@pytest.mark.parametrize("value", [False, None, "", "False", 0])
def test_switches_that_are_off(args, value):
    args.using_mlops = value
    refuse_unsupported(args)


def test_cross_silo_is_refused(args):
    args.training_type = "cross_silo"
    with pytest.raises(IntegrationError, match="use simulation"):
        experiment_from_args(args)
