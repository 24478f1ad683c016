"""Typed settings of a cluster file, one class a provider. Knows no YAML; imports nothing heavy.

Every class is frozen, refuses unknown keys and takes no loose types. The string under a field is its reference text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _label(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9./_-]*[A-Za-z0-9])?", text):
        raise ValueError(f"{text!r} is no label of Ray's: letters and digits, between them also . / _ -")
    return text


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9-]{0,39}$")]
Port = Annotated[int, Field(gt=0, lt=65536)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
Label = Annotated[str, AfterValidator(_label)]
Labels = dict[Label, Label]
"""Of Ray's nodes: seen in `ray list nodes`, and what Ray code can select machines by."""
Price = Annotated[float, Field(ge=0)]
"""In the currency in which the one who asks pays."""
Host = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*$")]
"""A name or an address: never an option of ssh."""


@dataclass(frozen=True)
class Offer:
    """What a cluster has for workers, or may grow to, in one of its pools."""

    pool: str
    machines: int
    """At most."""
    cpus: int | None
    """Places for workers without a GPU, on one machine. None: as many as it turns out to have."""
    gpus: int | None
    gpu: str | None = None
    """Type, by Ray's name."""

    def places(self, *, on_gpus: bool, gpu: str | None) -> float:
        """For workers that each take a GPU (of a type, if one is named), or none. Infinite if that is not known."""
        if gpu is not None and gpu != self.gpu:
            return 0 if self.gpu is not None or self.gpus == 0 else math.inf
        each = self.gpus if on_gpus else self.cpus
        return math.inf if each is None else self.machines * each

    def __str__(self) -> str:
        gpus = "GPUs" if self.gpus is None else f"{self.gpus} {self.gpu or 'GPU'}" if self.gpus else ""
        cpus = "" if self.gpus or self.cpus is None else f"{self.cpus} CPUs"
        return f"{self.pool}: {self.machines} of {gpus or cpus or 'CPUs'}"


class Settings(BaseModel):
    """Base of all settings."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class CustomGpu(Settings):
    """A kind of GPU that cluster/catalog.yaml does not have, or a part of one (MIG).
    Without `like`, memory and speeds are needed."""

    like: str | None = None
    """One in the catalogue, for all that is not said here."""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of its memory and speed."""
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    """GiB of memory."""
    tflops: Annotated[float, Field(gt=0)] | None = None
    """10^12 operations a second by the data sheet: bf16, dense."""
    matmul_tflops: Annotated[float, Field(gt=0)] | None = None
    """Of these what a matrix product reaches. None: 0.85 of tflops."""
    memory_gb_s: Annotated[float, Field(gt=0)] | None = None
    """GB a second between the GPU and its memory."""
    link_gb_s: Annotated[float, Field(gt=0)] | None = None
    """GB a second of NVLink to its neighbours, both directions together. None: PCIe."""
    watts: Annotated[float, Field(gt=0)] | None = None
    """At work, for the energy of a job."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.like is None and None in (self.memory_gib, self.tflops, self.memory_gb_s):
            raise ValueError("say what it is `like`, or memory_gib, tflops and memory_gb_s")
        return self


class Cluster(Settings):
    """What every kind of cluster has."""

    made_by_muster: ClassVar[bool] = True
    """Whether `up` starts it and `down` ends it."""

    provider: str
    """Where the machines come from."""
    name: Name
    """What it is called on the command line (`--on NAME`)."""
    storage: str | None = None
    """Where runs are kept whose job does not name a bucket: a bucket,
    or a folder that every machine of the cluster sees."""
    shared: list[str] = []
    """Folders that every machine of the cluster sees: what lies there is not carried along with a job."""
    stop_s: Positive = 300
    """Seconds: longest time that a job may take for its last checkpoint when it is stopped."""
    custom: dict[Label, CustomGpu] = {}
    """Kinds of GPUs that the catalogue does not have, by the name that pools call them
    by (`gpu:`). For `muster plan`."""

    @property
    def offers(self) -> Sequence[Offer]:
        """What a job can have here at most. Empty: not known."""
        return ()


class Local(Cluster):
    """Ray on this machine, on loopback alone, for several jobs one after the other or side by side."""

    provider: Literal["local"]
    cpus: Positive | None = None
    """Places for workers without a GPU. None: the cores of the machine."""
    gpus: Count | None = None
    """Places for workers with a GPU. None: all there are."""

    @property
    def offers(self) -> Sequence[Offer]:
        return (Offer("this machine", 1, self.cpus, self.gpus),)


class Existing(Cluster):
    """A Ray cluster that somebody else started."""

    made_by_muster: ClassVar[bool] = False

    provider: Literal["existing"]
    address: str = Field(examples=["http://10.0.0.5:8265"], pattern=r"^https?://[^/\s]+$")
    """Of its dashboard, which takes jobs."""
    token_file: str | None = None
    """File with its token. None: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token if there is one."""
    ssh: Host | None = None
    """A machine that sees the address: it is reached through an SSH tunnel over this one."""
    user: Host | None = None
    """On that machine. None: as ssh decides."""
    ssh_port: Port | None = None
    """Of sshd. None: as ssh decides."""
    key: str | None = None
    """File of the private key. None: as ssh decides."""
    ssh_options: list[str] = []
    """For `ssh -o`, such as ProxyJump=gate."""


class Head(Settings):
    """The machine that leads the cluster; drivers of jobs run there.
    Workers do not, unless it is given places for them."""

    host: Host = Field(examples=["10.0.0.1"])
    """What ssh connects to."""
    address: Host | None = None
    """How the other machines reach it, if that is not `host`: an address of the private network."""
    cpus: Count = 0
    """Places for workers without a GPU."""
    gpus: Count = 0
    """Places for workers with a GPU."""
    price: Price | None = None
    """An hour."""


class Machines(Settings):
    """Machines of one kind."""

    hosts: Annotated[list[Host], Field(min_length=1)] = Field(examples=["[10.0.0.2, 10.0.0.3]"])
    """What ssh connects to; the first machine reaches them there too."""
    cpus: Positive | None = None
    """Places for workers without a GPU, on one machine. None: its cores."""
    gpus: Count | None = None
    """Of one machine. None: all there are."""
    gpu: str | None = None
    """Type, for `resources.accelerator` of a job, such as A100. None: as Ray finds it."""
    price: Price | None = None
    """Of one machine, an hour."""
    labels: Labels = {}
    """Of Ray's nodes: seen in `ray list nodes`, and what Ray code can select machines by."""


class Ssh(Cluster):
    """Machines that you own, reached by SSH."""

    provider: Literal["ssh"]
    head: Head
    """The machine that leads the cluster; drivers of jobs run there."""
    pools: Annotated[dict[str, Machines], Field(min_length=1)]
    """Machines for workers, by a name of your choice."""
    user: Host | None = None
    """On all machines. None: as ssh decides."""
    ssh_port: Port | None = None
    """Of sshd. None: as ssh decides."""
    key: str | None = None
    """File of the private key. None: as ssh decides."""
    ssh_options: list[str] = []
    """For `ssh -o`, such as ProxyJump=gate."""
    python: str = "python3"
    """Python on the machines, with Muster's dependencies: a path, or a name that a login shell finds."""
    setup: list[str] = []
    """Commands that are run on every machine, in order, before Ray starts there."""
    port: Port = 6379
    """Of Ray on the head."""
    dashboard_port: Port = 8265
    """On the head's loopback."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        twice = sorted({host for host in self.hosts if self.hosts.count(host) > 1})
        if twice:
            raise ValueError(
                f"{', '.join(twice)}: named more than once; a head that is to work too gets `cpus` and `gpus` in `head`"
            )
        return self

    @property
    def hosts(self) -> list[str]:
        """All machines, the head first."""
        return [self.head.host, *(host for pool in self.pools.values() for host in pool.hosts)]

    @property
    def offers(self) -> Sequence[Offer]:
        head = Offer("head", 1, self.head.cpus, self.head.gpus)
        pools = [Offer(name, len(pool.hosts), pool.cpus, pool.gpus, pool.gpu) for name, pool in self.pools.items()]
        return [head, *pools] if head.cpus or head.gpus else pools


class Slurm(Cluster):
    """Slurm: every job is an allocation in which Ray is started for that job alone."""

    made_by_muster: ClassVar[bool] = False

    provider: Literal["slurm"]
    folder: str = Field(examples=["/home/me/muster"], pattern="^/")
    """Where jobs and their output are kept; the login machine and all nodes see it."""
    workers_per_node: Positive
    """As many as a node has GPUs, or processes without one."""
    gpus_per_node: Count = 0
    """GPUs to ask for. 0: none."""
    cpus_per_node: Positive | None = None
    """Cores to ask for. None: one for each worker."""
    partition: str | None = None
    """sbatch's --partition. None: Slurm's default."""
    account: str | None = None
    """sbatch's --account. None: Slurm's default."""
    qos: str | None = None
    """sbatch's --qos. None: Slurm's default."""
    time: Annotated[str, Field(pattern=r"^[0-9:-]+$")] = "1-00:00:00"
    """Longest time of an allocation, as Slurm writes it. A job that needs more goes on in the next one."""
    notice_s: Positive = 120
    """Seconds before the end of that time at which the job is told to save."""
    options: list[Annotated[str, Field(pattern="^--")]] = []
    """More of sbatch's options, such as --constraint=a100."""
    login: Host | None = None
    """The machine with sbatch, reached by SSH. None: this one."""
    user: Host | None = None
    """On that machine. None: as ssh decides."""
    ssh_port: Port | None = None
    """Of sshd. None: as ssh decides."""
    key: str | None = None
    """File of the private key. None: as ssh decides."""
    ssh_options: list[str] = []
    """For `ssh -o`, such as ProxyJump=gate."""
    python: str = "python3"
    """On the nodes, with Muster's dependencies."""
    setup: list[str] = []
    """Commands that are run on every node before Ray starts, such as `module load cuda`."""


class GrowingPool(Settings):
    """Machines of one kind for workers, of which there are as many as jobs want."""

    min: Count = 0
    """Kept also when no job wants them."""
    max: Positive
    """Most machines at a time."""
    cpus: Positive
    """Of a machine."""
    gpus: Count = 0
    """Of a machine."""
    gpu: str | None = None
    """Type, for `resources.accelerator` of a job, such as A100."""
    image: str | None = None
    """Of these machines. None: the cluster's."""
    price: Price | None = None
    """Of one machine, an hour; on demand, where there are several markets."""
    labels: Labels = {}
    """Of Ray's nodes: seen in `ray list nodes`, and what Ray code can select machines by."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, more than max, which is {self.max}")
        return self


def _grown(pools: Mapping[str, GrowingPool]) -> list[Offer]:
    """What pools have when they are as large as they may be."""
    return [Offer(name, pool.max, pool.cpus, pool.gpus, pool.gpu) for name, pool in pools.items()]


class PodPool(GrowingPool):
    """Pods of one kind, one a machine."""

    memory_gib: Positive
    """GiB of memory of a pod."""
    gpu_resource: str = "nvidia.com/gpu"
    """What the cluster calls its GPUs, a partition of one (MIG) too."""
    shared_memory_gib: Positive = 8
    """GiB of /dev/shm, where NCCL and data loaders put what processes of a machine share."""
    node_selector: dict[str, str] = {}
    """Labels of the nodes that pods may go to."""
    tolerations: list[dict[str, Any]] = []
    """Taints of nodes that pods put up with, as Kubernetes writes them."""


class PodHead(Settings):
    """The pod that leads."""

    cpus: Positive = 4
    """Cores of the pod."""
    memory_gib: Positive = 16
    """GiB of memory of the pod."""
    price: Price | None = None
    """An hour."""
    node_selector: dict[str, str] = {}
    """Labels of the nodes that the pod may go to."""


KubernetesName = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$")]


class Kubernetes(Cluster):
    """A RayCluster of KubeRay (1.5 or newer), reached with kubectl.
    Pods come when a job wants them and go when they are idle."""

    provider: Literal["kubernetes"]
    name: KubernetesName
    image: str
    """With Muster's dependencies."""
    namespace: KubernetesName = "default"
    """Where everything is made."""
    context: str | None = None
    """Of kubectl. None: the current one."""
    head: PodHead = PodHead()
    """The pod that leads; drivers of jobs run there."""
    pools: Annotated[dict[KubernetesName, PodPool], Field(min_length=1)]
    """Pods for workers, by a name of your choice."""
    idle_minutes: Positive = 10
    """Minutes after which a pod that nobody uses is given back."""
    service_account: str | None = None
    """Of all pods: what lets them into storage without a key."""

    @property
    def offers(self) -> Sequence[Offer]:
        return _grown(self.pools)


class CloudPool(GrowingPool):
    """Machines of one kind."""

    instance: str = Field(examples=["p4d.24xlarge"])
    """What the cloud calls this kind of machine."""
    market: Literal["on-demand", "spot", "spot-first"] = "on-demand"
    """spot-first: on demand where the cloud has no spot machines to give."""
    disk_gib: Positive = 200
    """GiB of its disk."""
    spot_price: Price | None = None
    """As `price`, on the spot market, about."""


class CloudHead(Settings):
    """The machine that leads. It needs no GPU: drivers of jobs run there, workers do not."""

    instance: str = Field(examples=["m5.2xlarge"])
    """What the cloud calls this kind of machine."""
    image: str | None = None
    """None: the cluster's."""
    disk_gib: Positive = 100
    """GiB of its disk."""
    price: Price | None = None
    """An hour."""


class Cloud(Cluster):
    """Machines of a cloud, by Ray's cluster launcher. They come when a job wants them and go when they are idle."""

    image: str | None = None
    """Of all machines. None: the one that Ray's launcher takes by default."""
    head: CloudHead
    """The machine that leads; drivers of jobs run there."""
    pools: Annotated[dict[Name, CloudPool], Field(min_length=1)]
    """Machines for workers, by a name of your choice."""
    user: Host = "ubuntu"
    """Whom the image lets in by SSH."""
    files: dict[str, str] = {}
    """Copied to every machine: {path there: path here, from the cluster file if it is relative}."""
    setup: list[str] = []
    """Commands that are run on every machine, in order, before Ray starts there."""
    python: str = "python3"
    """On the machines, with Muster's dependencies."""
    idle_minutes: Positive = 10
    """Minutes after which a machine that nobody uses is given back."""
    orphan_minutes: Count | None = 15
    """Minutes without an answer of the head after which a machine for workers shuts itself down. 0 or None: never.
    Until `down` such a machine costs nothing more on EC2, its disk on Compute Engine and Azure."""
    private: bool = False
    """Machines without a public address: reached from inside their network only."""

    @property
    def offers(self) -> Sequence[Offer]:
        return _grown(self.pools)


class Aws(Cloud):
    """EC2. Credentials are those of boto3: the environment, ~/.aws."""

    provider: Literal["aws"]
    region: str = Field(examples=["us-west-2"])
    """Of all machines."""
    zones: list[str] = []
    """Tried in order. Empty: all of the region."""
    instance_profile: str | None = None
    """Name of the IAM instance profile of all machines; it lets them into storage, and the head start machines.
    None: one that Ray makes for the head alone."""
    subnets: list[str] = []
    """Empty: those of the default network."""
    security_groups: list[str] = []
    """Empty: one that is made: SSH from everywhere, everything among the machines themselves."""


class Gcp(Cloud):
    """Compute Engine. Credentials are the application default ones of gcloud."""

    provider: Literal["gcp"]
    project: str
    """Id of the project that pays."""
    zone: str = Field(examples=["us-central1-a"])
    """Of all machines."""
    service_account: str | None = None
    """Email, of all machines; it lets them into storage. None: one that Ray makes for the head alone."""

    @property
    def region(self) -> str:
        return self.zone.rpartition("-")[0]


class Azure(Cloud):
    """Virtual machines. Credentials are those of the az command."""

    provider: Literal["azure"]
    subscription: str
    """Id of the subscription that pays."""
    resource_group: str
    """Where everything is made."""
    region: str = Field(examples=["westus2"])
    """Of all machines."""
    image: Annotated[str, Field(pattern="^[^:]+:[^:]+:[^:]+:[^:]+$")] | None = None
    """PUBLISHER:OFFER:SKU:VERSION. None: the one that Ray's launcher takes by default."""


SPECS: dict[str, type[Cluster]] = {
    "local": Local,
    "existing": Existing,
    "ssh": Ssh,
    "kubernetes": Kubernetes,
    "slurm": Slurm,
    "aws": Aws,
    "gcp": Gcp,
    "azure": Azure,
}
"""By provider."""
