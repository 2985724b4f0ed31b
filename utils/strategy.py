"""One device or many: the `tf.distribute` strategy that --strategy asks for.

Whatever it is, a replica is a device with a copy of the model, a batch is shared among replicas,
and a worker is a process. One of the workers, the chief, writes files and prints.
"""

import argparse
import contextlib
import hashlib
import json
import os
from collections.abc import Iterator

from utils.quiet_tensorflow import tf

from utils.cli import UserError, number

NONE, MIRRORED, MULTIWORKER = "none", "mirrored", "multiworker"


def add_strategy_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `open_strategy` reads."""
    add = parser.add_argument
    add(
        "--strategy",
        choices=(NONE, MIRRORED, MULTIWORKER),
        default=NONE,
        help="train on one device, on all GPUs of this machine, or in one process for each worker "
        "that the environment variable TF_CONFIG names (default: %(default)s)",
    )
    add(
        "--logical-cpus",
        type=number(int, at_least=1, at_most=64),
        help="mirror over the CPU, split into N devices, instead of the GPUs",
    )


@contextlib.contextmanager
def open_strategy(arguments: argparse.Namespace) -> Iterator[tf.distribute.Strategy]:
    """Yields the strategy that the options ask for.

    Must be entered before anything else is done in TensorFlow, which could not be split into
    devices or connected to other workers any more.

    Raises:
      UserError: the options or TF_CONFIG do not fit, this worker cannot join the others, or
        within the context, another one was lost.
    """
    if arguments.logical_cpus and arguments.strategy != MIRRORED:
        raise UserError("--logical-cpus goes with --strategy mirrored only")
    if arguments.strategy == NONE:
        yield tf.distribute.get_strategy()
    elif arguments.strategy == MIRRORED:
        yield tf.distribute.MirroredStrategy(_local_devices(arguments.logical_cpus))
    else:
        workers, index = _cluster(os.environ.get("TF_CONFIG"))
        print(f"worker {index} of {len(workers)}: waiting for the others", flush=True)
        try:
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
        except tf.errors.OpError as error:
            raise UserError(
                f"worker {index} cannot join at {workers[index]}: {error.message}"
            ) from error
        try:
            yield strategy
            # Of a worker that ended before the others, TensorFlow would tell them that it crashed.
            all_workers_have("ended", strategy)
        except (tf.errors.UnavailableError, tf.errors.AbortedError) as error:
            raise UserError(
                "lost another worker; start all of them again to go on after the last whole epoch"
            ) from error


def _local_devices(logical_cpus: int | None) -> list[str]:
    if logical_cpus:
        (cpu,) = tf.config.list_physical_devices("CPU")
        parts = [tf.config.LogicalDeviceConfiguration()] * logical_cpus
        tf.config.set_logical_device_configuration(cpu, parts)
        return [f"CPU:{index}" for index in range(logical_cpus)]
    gpus = tf.config.list_physical_devices("GPU")
    return [f"GPU:{index}" for index in range(len(gpus))] or ["CPU:0"]


def _cluster(tf_config: str | None) -> tuple[list[str], int]:
    """The addresses of all workers, and which of them this one is."""
    example = '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}'
    if not tf_config:
        raise UserError(f"--strategy multiworker needs TF_CONFIG={example}")
    try:
        config = json.loads(tf_config)
        cluster, task = config["cluster"], config["task"]
        workers, index = cluster["worker"], task["index"]
        well_formed = (
            list(cluster) == ["worker"]
            and isinstance(workers, list)
            and all(isinstance(worker, str) and worker.isprintable() for worker in workers)
            and task["type"] == "worker"
            and type(index) is int
            and index in range(len(workers))
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        well_formed = False
    if not well_formed:
        raise UserError(f"TF_CONFIG must be like {example}; it is {tf_config}")
    return workers, index


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    resolver = strategy.cluster_resolver
    return resolver is None or resolver.task_id == 0


def all_workers_have(text: str, strategy: tf.distribute.Strategy) -> bool:
    """Whether this `text` is the same on every worker."""
    if strategy.cluster_resolver is None:
        return True
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    digests = strategy.experimental_distribute_values_from_function(
        lambda _: tf.constant([digest], tf.int64)
    )
    return len(set(strategy.gather(digests, axis=0).numpy())) == 1
