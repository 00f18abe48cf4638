"""
Serves a model with Ray Serve: several replicas, on one machine or a cluster.

    pip install mm-transformers[serve] "ray[serve]"
    serve run ray_serve:build model=my-model replicas=2

Each replica is the application of `mm-transformers serve`, with its own queue and batches; Ray spreads the requests.
"""

from typing import Any

from ray import serve

from mm_transformers.sharing.serving.app import create_app
from mm_transformers.sharing.serving.settings import ServeSettings


def build(args: dict[str, Any]) -> serve.Application:
    """
    The application for `serve run`.

    Args:
        args: `model`, a folder or Hub id that all machines can read; `replicas`; `cpus` and `gpus` of each replica.
    """
    model, cpus = args["model"], float(args.get("cpus", 1))
    settings = ServeSettings(threads=max(1, int(cpus)))

    def app() -> Any:
        # Built in each replica: a model does not travel.
        return create_app(model, settings)

    @serve.deployment(
        num_replicas=int(args.get("replicas", 1)),
        ray_actor_options={"num_cpus": cpus, "num_gpus": float(args.get("gpus", 0))},
        # The replica itself refuses what does not fit into its queue.
        max_ongoing_requests=2 * settings.waiting_rows,
    )
    @serve.ingress(app)
    class Model:
        pass

    return Model.bind()
