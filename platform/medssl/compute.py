"""Where a study runs."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import Field, field_validator

from medssl.params import Params

SPARE_CPUS = 2
"""Logical CPUs beyond the workers': Ray Data hangs without a message when a training holds every CPU of the cluster."""


class TrackingParams(Params):
    """Experiment trackers that are told of losses, trials and scores (never of images, patients or labels)."""

    mlflow: str | None = None
    """URI of an MLflow tracking server (http://host:5000) or of its database; null tells none. User and password belong into
    MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, a token into MLFLOW_TRACKING_TOKEN, on every node."""
    wandb: str | None = Field(None, pattern=r"^[\w.-]+(/[\w.-]+)?$")
    """Project of Weights & Biases, `project` or `entity/project`; null tells none. WANDB_API_KEY is taken from every node."""

    @field_validator("mlflow")
    @classmethod
    def _without_secrets(cls, uri: str | None) -> str | None:
        if uri is None:
            return None
        parts = urlsplit(uri)
        if parts.scheme not in {"http", "https", "sqlite", "databricks"}:
            raise ValueError(f"{parts.scheme or uri!r} is no scheme of a tracking server: give http(s)://host:port or sqlite:////path")
        if parts.username or parts.password:
            raise ValueError("has a user or password in it: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead")
        return uri


class Compute(Params):
    """Where it runs; nothing here changes a result or a hash."""

    workers: int = Field(1, ge=1)
    """DDP workers of a pretraining."""
    cpus_per_worker: int = Field(1, ge=1)
    """CPU cores of each worker."""
    gpus_per_worker: float = Field(0, ge=0, le=1)
    """GPUs of each trial, which may share one; 0 trains on the CPU. A pretraining worker takes a whole one."""
    trial_cpus: int = Field(1, ge=1)
    """CPU cores of a search or evaluation trial."""
    concurrent_trials: int | None = Field(None, ge=1)
    """Trials at once; null fills the machine's cores."""
    reading_cpus: int | None = Field(None, ge=1)
    """CPUs that decode what is streamed and pack streamed bags; null all that are free, which another study may want too.
    Each worker that streams bags has one at least."""
    checkpoint_every_epochs: int = Field(1, ge=1)
    """Checkpoints at the end of every so many epochs and of the last; more than 1 where an epoch takes seconds."""
    checkpoint_every_steps: int | None = Field(None, ge=1)
    """Further checkpoints between epoch ends (resident feeding); null none."""
    keep_checkpoints: int = Field(2, ge=1)
    """Checkpoints kept in the store while training."""
    monitor_every_epochs: int | None = Field(None, ge=1)
    """kNN accuracy on the validation split after every so many epochs of a pretraining, as a curve in the report; null none."""
    max_failures: int = Field(8, ge=0)
    """Lost workers or nodes that a pretraining survives."""
    wait_for_nodes_minutes: float = Field(0, ge=0)
    """How long a run waits for nodes that come on demand (an autoscaler's, a queue's); 0 refuses a cluster that is too small."""
    tracking: TrackingParams = TrackingParams()
    """MLflow and Weights & Biases."""

    def needed(self, *, pretrains: bool) -> dict[str, float]:
        """What a cluster must have for a study at all: CPUs, those for reading among them, and GPUs."""
        cpus = max(self.workers * self.cpus_per_worker, self.trial_cpus) + SPARE_CPUS
        gpus = self.workers if self.gpus_per_worker and pretrains else self.gpus_per_worker
        return {"CPU": float(cpus), "GPU": float(gpus)}
