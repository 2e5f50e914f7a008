"""FedML's own keys that a configuration file may hold beside ours.

A FedML main reads them for its own purposes (``fedml.data.load``, ``fedml.init`` ...); a FedMosaic
run does not. Every other unknown key is an error. Nothing here imports FedML.
"""

from __future__ import annotations

from collections.abc import Mapping

IGNORED: Mapping[str, frozenset[str]] = {
    # YAML section: keys of FedML 0.9.6 and its examples
    "common_args": frozenset(
        {"mlops_api_key", "mlops_project_name", "mlops_run_name", "run_id", "rank", "role"}
    ),
    "environment_args": frozenset({"bootstrap"}),
    "data_args": frozenset(
        {
            "dataset",
            "data_cache_dir",
            "data_file_path",
            "partition_alpha",
            "partition_file_path",
            "partition_method",
        }
    ),
    "model_args": frozenset({"model", "model_file_cache_folder", "global_model_file_path"}),
    "train_args": frozenset(
        {
            "batch_size",
            "client_id_list",
            "client_optimizer",
            "epochs",
            "learning_rate",
            "momentum",
            "server_lr",
            "server_momentum",
            "server_optimizer",
            "weight_decay",
        }
    ),
    "validation_args": frozenset({"frequency_of_the_test"}),
    "device_args": frozenset({"device_type", "gpu_mapping_file", "gpu_mapping_key", "worker_num"}),
    "comm_args": frozenset(
        {
            "customized_training_mqtt_config",
            "customized_training_s3_config",
            "grpc_ipconfig_path",
            "is_mobile",
            "mqtt_config_path",
            "s3_config_path",
            "trpc_master_config_path",
        }
    ),
    "tracking_args": frozenset(
        {
            "enable_sys_perf_profiling",
            "log_file_dir",
            "run_name",
            "wandb_entity",
            "wandb_key",
            "wandb_name",
            "wandb_only_server",
            "wandb_project",
        }
    ),
    "attack_args": frozenset(
        {"attack_prob", "attack_type", "byzantine_client_num", "attack_mode", "poisoned_client_num"}
    ),
    "defense_args": frozenset({"byzantine_client_num", "client_num_per_round", "defense_type"}),
    "fhe_args": frozenset({"batch_size", "file_loc", "scaling_factor", "scheme"}),
}
"""Accepted and not used."""

REPLACED: Mapping[tuple[str, str], str] = {
    ("train_args", "batch_size"): "optim_args.optim.batch_size",
    ("train_args", "epochs"): "optim_args.optim.num_steps",
    ("train_args", "learning_rate"): "optim_args.optim.learning_rate",
    ("train_args", "weight_decay"): "optim_args.optim.weight_decay",
    ("validation_args", "frequency_of_the_test"): "eval_args.evaluation.every",
    ("data_args", "dataset"): "data_args.data.source",
    ("model_args", "model"): "model_args.models",
}
"""Ignored keys that have a counterpart of ours; a file that sets them gets a log message."""

REFUSED: Mapping[str, str] = {
    # switch: why it cannot be true, and what to do
    "enable_fhe": (
        "FedML 0.9.6 can never switch encryption on (it would upload nothing); remove it, "
        "and protect updates by dp_args instead"
    ),
    "enable_defense": (
        "FedML's defences compare whole models of one shape, and clients here have several; "
        "remove it"
    ),
    "enable_attack": (
        "FedML's attacks assume models of one shape, and clients here have several; remove it"
    ),
    "enable_tracking": (
        "FedML's tracking needs an account and the internet, and no run opens a connection; "
        "set it to false, and set run_args.run.tensorboard: true for curves"
    ),
    "using_mlops": (
        "FedML's MLOps needs an account and the internet, and no run opens a connection; "
        "set it to false"
    ),
    "enable_wandb": (
        "Weights & Biases needs the internet, and no run opens a connection; "
        "set it to false, and set run_args.run.tensorboard: true for curves"
    ),
}
"""Switches that must be false wherever they stand."""
