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
WorkerSupervisor = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*$")]
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
    """A kind of GPU that cluster/catalog.yaml does not have, or a part of one (MIG). Without `like`, memory_gib, tflops
    and memory_gb_s are required."""

    like: str | None = None
    """A GPU of the catalog, whose values are used where none is given here."""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of the memory and the speed of that GPU."""
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory in GiB."""
    tflops: Annotated[float, Field(gt=0)] | None = None
    """Peak speed by the data sheet, in 10^12 operations per second: bf16, dense."""
    matmul_tflops: Annotated[float, Field(gt=0)] | None = None
    """Speed that a matrix product reaches, in the same unit. None: 0.85 of tflops."""
    memory_gb_s: Annotated[float, Field(gt=0)] | None = None
    """Memory bandwidth, in GB per second."""
    link_gb_s: Annotated[float, Field(gt=0)] | None = None
    """Bandwidth of NVLink between neighbors, in GB per second, both directions together. None: PCIe."""
    watts: Annotated[float, Field(gt=0)] | None = None
    """Power under load, for the energy of a job."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.like is None and None in (self.memory_gib, self.tflops, self.memory_gb_s):
            raise ValueError("say what it is `like`, or memory_gib, tflops and memory_gb_s")
        return self


class Cluster(Settings):
    """Settings of every kind of cluster."""

    made_by_muster: ClassVar[bool] = True
    """Whether `up` starts it and `down` ends it."""

    provider: str
    """Where the machines come from."""
    name: Name
    """Name of the cluster on the command line (`--on NAME`)."""
    storage: str | None = None
    """Where runs are stored if their job does not name a bucket: a bucket, or a folder that all machines of the cluster
    share."""
    shared: list[str] = []
    """Folders that all machines of the cluster share. Files in them are not uploaded with a job."""
    stop_s: Positive = 300
    """Maximum time in seconds for the last checkpoint of a job that is stopped."""
    custom: dict[Label, CustomGpu] = {}
    """Kinds of GPUs that the catalog does not have, under the names that pools use for them (`gpu:`). For `muster
    plan`."""

    @property
    def offers(self) -> Sequence[Offer]:
        """What a job can have here at most. Empty: not known."""
        return ()


class Local(Cluster):
    """Ray on this machine, bound to loopback, for one or more jobs."""

    provider: Literal["local"]
    cpus: Positive | None = None
    """Number of workers without a GPU that fit. None: the number of cores."""
    gpus: Count | None = None
    """Number of workers with a GPU that fit. None: all GPUs."""

    @property
    def offers(self) -> Sequence[Offer]:
        return (Offer("this machine", 1, self.cpus, self.gpus),)


class Existing(Cluster):
    """A Ray cluster that Muster did not start."""

    made_by_muster: ClassVar[bool] = False

    provider: Literal["existing"]
    address: str = Field(examples=["http://10.0.0.5:8265"], pattern=r"^https?://[^/\s]+$")
    """Address of the dashboard, which accepts jobs."""
    token_file: str | None = None
    """File with the token of the cluster. None: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token if it
    exists."""
    ssh: WorkerSupervisor | None = None
    """A machine from which the address can be reached; Muster opens an SSH tunnel through it."""
    user: WorkerSupervisor | None = None
    """User name on that machine. None: as configured for ssh."""
    ssh_port: Port | None = None
    """Port of sshd. None: as configured for ssh."""
    key: str | None = None
    """File of the private key. None: as configured for ssh."""
    ssh_options: list[str] = []
    """Options for `ssh -o`, such as ProxyJump=gate."""


class Head(Settings):
    """The machine that runs Ray's head and the drivers of jobs. Workers run there only if it has `cpus` or `gpus`."""

    host: WorkerSupervisor = Field(examples=["10.0.0.1"])
    """Name or address for ssh."""
    address: WorkerSupervisor | None = None
    """Address at which the other machines reach it, if that is not `host`: an address of the private network."""
    cpus: Count = 0
    """Number of workers without a GPU that may run there."""
    gpus: Count = 0
    """Number of workers with a GPU that may run there."""
    price: Price | None = None
    """Price per hour."""


class Machines(Settings):
    """Machines of one kind."""

    hosts: Annotated[list[WorkerSupervisor], Field(min_length=1)] = Field(examples=["[10.0.0.2, 10.0.0.3]"])
    """Names or addresses for ssh, at which the head reaches them, too."""
    cpus: Positive | None = None
    """Number of workers without a GPU per machine. None: the number of cores."""
    gpus: Count | None = None
    """Number of GPUs per machine. None: all GPUs."""
    gpu: str | None = None
    """Type of GPU, for `resources.accelerator` of a job, such as A100. None: as detected by Ray."""
    price: Price | None = None
    """Price of one machine per hour."""
    labels: Labels = {}
    """Labels of Ray's nodes: shown by `ray list nodes`, and available to Ray code for selecting machines."""


class Ssh(Cluster):
    """Machines that you own, reached by SSH."""

    provider: Literal["ssh"]
    head: Head
    """The machine that runs Ray's head and the drivers of jobs."""
    pools: Annotated[dict[str, Machines], Field(min_length=1)]
    """Machines for workers, under names of your choice."""
    user: WorkerSupervisor | None = None
    """User name on all machines. None: as configured for ssh."""
    ssh_port: Port | None = None
    """Port of sshd. None: as configured for ssh."""
    key: str | None = None
    """File of the private key. None: as configured for ssh."""
    ssh_options: list[str] = []
    """Options for `ssh -o`, such as ProxyJump=gate."""
    python: str = "python3"
    """Python on the machines, with Muster's dependencies: a path, or a name that a login shell finds."""
    setup: list[str] = []
    """Commands that run on every machine, in order, before Ray starts there."""
    port: Port = 6379
    """Port of Ray on the head."""
    dashboard_port: Port = 8265
    """Port of the dashboard, on the head's loopback interface."""

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
    """Slurm: every job is an allocation with a Ray cluster of its own."""

    made_by_muster: ClassVar[bool] = False

    provider: Literal["slurm"]
    folder: str = Field(examples=["/home/me/muster"], pattern="^/")
    """Folder for jobs and their output, shared by the login machine and all nodes."""
    workers_per_node: Positive
    """Workers per node: the number of its GPUs, or of processes without one."""
    gpus_per_node: Count = 0
    """GPUs to request per node. 0: none."""
    cpus_per_node: Positive | None = None
    """Cores to request per node. None: one per worker."""
    partition: str | None = None
    """Value of sbatch's --partition. None: Slurm's default."""
    account: str | None = None
    """Value of sbatch's --account. None: Slurm's default."""
    qos: str | None = None
    """Value of sbatch's --qos. None: Slurm's default."""
    time: Annotated[str, Field(pattern=r"^[0-9:-]+$")] = "1-00:00:00"
    """Time limit of an allocation, in Slurm's notation. A job that takes longer continues in the next allocation."""
    notice_s: Positive = 120
    """The job is told to save this many seconds before the time limit."""
    options: list[Annotated[str, Field(pattern="^--")]] = []
    """Further options of sbatch, such as --constraint=a100."""
    login: WorkerSupervisor | None = None
    """The machine with sbatch, reached by SSH. None: this machine."""
    user: WorkerSupervisor | None = None
    """User name on that machine. None: as configured for ssh."""
    ssh_port: Port | None = None
    """Port of sshd. None: as configured for ssh."""
    key: str | None = None
    """File of the private key. None: as configured for ssh."""
    ssh_options: list[str] = []
    """Options for `ssh -o`, such as ProxyJump=gate."""
    python: str = "python3"
    """Python on the nodes, with Muster's dependencies."""
    setup: list[str] = []
    """Commands that run on every node before Ray starts, such as `module load cuda`."""


class GrowingPool(Settings):
    """Machines of one kind for workers, started and stopped by demand."""

    min: Count = 0
    """Minimum number of machines, kept even if no job needs them."""
    max: Positive
    """Maximum number of machines."""
    cpus: Positive
    """Cores per machine."""
    gpus: Count = 0
    """GPUs per machine."""
    gpu: str | None = None
    """Type of GPU, for `resources.accelerator` of a job, such as A100."""
    image: str | None = None
    """Image of these machines. None: the image of the cluster."""
    price: Price | None = None
    """Price of one machine per hour; on demand, if there are several markets."""
    labels: Labels = {}
    """Labels of Ray's nodes: shown by `ray list nodes`, and available to Ray code for selecting machines."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, more than max, which is {self.max}")
        return self


def _grown(pools: Mapping[str, GrowingPool]) -> list[Offer]:
    """What pools have when they are as large as they may be."""
    return [Offer(name, pool.max, pool.cpus, pool.gpus, pool.gpu) for name, pool in pools.items()]


class PodPool(GrowingPool):
    """Pods of one kind, one per machine."""

    memory_gib: Positive
    """Memory of a pod in GiB."""
    gpu_resource: str = "nvidia.com/gpu"
    """Resource name of the GPUs in Kubernetes, also that of a partition of one (MIG)."""
    shared_memory_gib: Positive = 8
    """Size of /dev/shm in GiB. NCCL and data loaders use it for memory that processes share."""
    node_selector: dict[str, str] = {}
    """Labels of the nodes that may run the pods."""
    tolerations: list[dict[str, Any]] = []
    """Taints of nodes that the pods tolerate, in the notation of Kubernetes."""


class PodHead(Settings):
    """The pod that runs Ray's head and the drivers of jobs."""

    cpus: Positive = 4
    """Cores of the pod."""
    memory_gib: Positive = 16
    """Memory of the pod in GiB."""
    price: Price | None = None
    """Price per hour."""
    node_selector: dict[str, str] = {}
    """Labels of the nodes that may run the pod."""


KubernetesName = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$")]


class Kubernetes(Cluster):
    """A RayCluster of KubeRay (1.5 or newer), reached with kubectl. Pods are created when a job needs them and deleted
    when they are idle."""

    provider: Literal["kubernetes"]
    name: KubernetesName
    image: str
    """Container image with Muster's dependencies."""
    namespace: KubernetesName = "default"
    """Namespace of all resources."""
    context: str | None = None
    """Context of kubectl. None: the current one."""
    head: PodHead = PodHead()
    """The pod that runs Ray's head and the drivers of jobs."""
    pools: Annotated[dict[KubernetesName, PodPool], Field(min_length=1)]
    """Pods for workers, under names of your choice."""
    idle_minutes: Positive = 10
    """Minutes after which an idle pod is deleted."""
    service_account: str | None = None
    """Service account of all pods, for access to storage without a key."""

    @property
    def offers(self) -> Sequence[Offer]:
        return _grown(self.pools)


class CloudPool(GrowingPool):
    """Machines of one kind."""

    instance: str = Field(examples=["p4d.24xlarge"])
    """The cloud's name of the machine type."""
    market: Literal["on-demand", "spot", "spot-first"] = "on-demand"
    """on-demand, spot, or spot-first: spot, and on demand while the cloud has no spot machines."""
    disk_gib: Positive = 200
    """Size of the disk in GiB."""
    spot_price: Price | None = None
    """Approximate price of one machine per hour on the spot market."""


class CloudHead(Settings):
    """The machine that runs Ray's head and the drivers of jobs. Workers do not run there, so it needs no GPU."""

    instance: str = Field(examples=["m5.2xlarge"])
    """The cloud's name of the machine type."""
    image: str | None = None
    """Image of this machine. None: the image of the cluster."""
    disk_gib: Positive = 100
    """Size of the disk in GiB."""
    price: Price | None = None
    """Price per hour."""


class Cloud(Cluster):
    """Machines of a cloud, started by Ray's cluster launcher. They are started when a job needs them and terminated
    when they are idle."""

    image: str | None = None
    """Image of all machines. None: the default of Ray's cluster launcher."""
    head: CloudHead
    """The machine that runs Ray's head and the drivers of jobs."""
    pools: Annotated[dict[Name, CloudPool], Field(min_length=1)]
    """Machines for workers, under names of your choice."""
    user: WorkerSupervisor = "ubuntu"
    """User name for SSH in the image."""
    files: dict[str, str] = {}
    """Files and folders to copy to every machine: {path there: path here}; relative paths start at the cluster file."""
    setup: list[str] = []
    """Commands that run on every machine, in order, before Ray starts there."""
    python: str = "python3"
    """Python on the machines, with Muster's dependencies."""
    idle_minutes: Positive = 10
    """Minutes after which an idle machine is terminated."""
    orphan_minutes: Count | None = 15
    """A worker machine shuts itself down when the head has not answered for this many minutes. 0 or None: never. Until
    `muster cluster down`, such a machine costs nothing more on EC2, and only its disk on Compute Engine and Azure."""
    private: bool = False
    """Machines without a public address, reachable only from inside their network."""

    @property
    def offers(self) -> Sequence[Offer]:
        return _grown(self.pools)


class Aws(Cloud):
    """EC2. Credentials are those of boto3: the environment or ~/.aws."""

    provider: Literal["aws"]
    region: str = Field(examples=["us-west-2"])
    """Region of all machines."""
    zones: list[str] = []
    """Availability zones, tried in order. Empty: all zones of the region."""
    instance_profile: str | None = None
    """Name of the IAM instance profile of all machines. It gives them access to storage, and lets the head start
    machines. None: a profile that Ray creates, for the head only."""
    subnets: list[str] = []
    """Subnets of the machines. Empty: those of the default network."""
    security_groups: list[str] = []
    """Security groups of the machines. Empty: a new one that allows SSH from everywhere, and all traffic among the
    machines."""


class Gcp(Cloud):
    """Compute Engine. Credentials are the application default credentials of gcloud."""

    provider: Literal["gcp"]
    project: str
    """Id of the project that is billed."""
    zone: str = Field(examples=["us-central1-a"])
    """Zone of all machines."""
    service_account: str | None = None
    """Email of the service account of all machines. It gives them access to storage. None: an account that Ray creates,
    for the head only."""

    @property
    def region(self) -> str:
        return self.zone.rpartition("-")[0]


class Azure(Cloud):
    """Azure virtual machines. Credentials are those of the az command."""

    provider: Literal["azure"]
    subscription: str
    """Id of the subscription that is billed."""
    resource_group: str
    """Resource group of all resources."""
    region: str = Field(examples=["westus2"])
    """Region of all machines."""
    image: Annotated[str, Field(pattern="^[^:]+:[^:]+:[^:]+:[^:]+$")] | None = None
    """PUBLISHER:OFFER:SKU:VERSION. None: the default of Ray's cluster launcher."""


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
