"""Every error this package raises on purpose, as one tree with stable codes.

    CrowdMeshError
    ├── InputError                  CM-1xx  what the user wrote
    │   ├── InvalidValueError       CM-101  a field of a value is out of range
    │   ├── FormatError             CM-102  JSON or TOML does not describe the value
    │   ├── InvalidCrowdError       CM-110  devices and links that cannot be a crowd
    │   ├── ModelError              CM-120  layers that cannot be a chain
    │   │   ├── ShapeMismatchError  CM-121  two layers do not fit each other
    │   │   └── UnsupportedLayerError CM-122  a layer that cannot be exported or cut
    │   ├── JobError                CM-130  batch, microbatches, loss, steps
    │   │   └── UnsupportedOptimizerError CM-131  an optimizer that cannot be sliced
    │   └── DataError               CM-140  a data source that does not keep its promise
    │       └── DataFileError       CM-141  a data file is missing, damaged or not as expected
    ├── PlanError                   CM-2xx  planning
    │   ├── InvalidPlanError        CM-201  a plan that is not a partition of the chain
    │   ├── UnknownSolverError      CM-202  no solver of that name
    │   ├── InfeasibleError         CM-203  no assignment fits
    │   ├── SolverError             CM-204  the solver's backend failed
    │   ├── InvalidCoalitionError   CM-205  groups that are not a partition of the crowd
    │   └── ScheduleError           CM-210  ops that are incomplete or deadlock
    ├── ProgramError                CM-3xx  stage programs
    │   ├── BundleError             CM-301  damaged, mismatched or of another version
    │   ├── ForbiddenProgramError   CM-302  asks for something a device does not allow
    │   └── ExportError             CM-303  cannot be traced or exported
    ├── TransportError              CM-4xx  bytes between processes
    │   ├── FrameError              CM-401  a frame that breaks the format or its bounds
    │   ├── AddressError            CM-402  an address that may not or cannot be used
    │   ├── StaleEpochError         CM-411  a message of an epoch that is over
    │   └── PeerLostError           CM-412  a peer is gone or silent past its deadline
    ├── RunError                    CM-5xx  a run in progress
    │   ├── ProtocolError           CM-501  a message that the protocol does not allow here
    │   ├── NonFiniteLossError      CM-510  the loss is NaN or infinite
    │   ├── AgentLostError          CM-511  a device died or went silent during the run
    │   ├── InterruptedRunError     CM-512  the user stopped the run
    │   ├── LaunchError             CM-513  an agent process did not come up
    │   └── RecordError             CM-520  a run folder, journal or checkpoint is unusable
    └── EnvironmentFaultError       CM-6xx  the machine
        ├── MissingExtraError       CM-601  an optional dependency is not installed
        └── ProfileCacheError       CM-602  measured times of another machine, or damaged

Messages say what, where, the value, and what to do. Codes never change their meaning. It knows
nothing about when errors are raised.
"""

from __future__ import annotations

from typing import ClassVar

DOCS_PAGE = "docs/errors.md"


class CrowdMeshError(Exception):
    """Base of all errors raised on purpose. `code` is stable across releases."""

    code: ClassVar[str] = "CM-000"

    def __str__(self) -> str:
        return f"[{self.code}] {super().__str__()}"

    @property
    def message(self) -> str:
        """The text without the code."""
        return super().__str__()

    @property
    def docs_anchor(self) -> str:
        """Where the documentation explains this code."""
        return f"{DOCS_PAGE}#{self.code.lower()}"


class InputError(CrowdMeshError):
    code = "CM-100"


class InvalidValueError(InputError, ValueError):
    code = "CM-101"


class FormatError(InputError, ValueError):
    code = "CM-102"


class InvalidCrowdError(InputError, ValueError):
    code = "CM-110"


class ModelError(InputError, ValueError):
    code = "CM-120"


class ShapeMismatchError(ModelError):
    code = "CM-121"


class UnsupportedLayerError(ModelError):
    code = "CM-122"


class JobError(InputError, ValueError):
    code = "CM-130"


class UnsupportedOptimizerError(JobError):
    code = "CM-131"


class DataError(InputError, ValueError):
    code = "CM-140"


class DataFileError(DataError):
    code = "CM-141"


class PlanError(CrowdMeshError):
    code = "CM-200"


class InvalidPlanError(PlanError, ValueError):
    code = "CM-201"


class UnknownSolverError(PlanError, LookupError):
    code = "CM-202"


class InfeasibleError(PlanError):
    code = "CM-203"


class SolverError(PlanError):
    code = "CM-204"


class InvalidCoalitionError(PlanError, ValueError):
    code = "CM-205"


class ScheduleError(PlanError, ValueError):
    code = "CM-210"


class ProgramError(CrowdMeshError):
    code = "CM-300"


class BundleError(ProgramError):
    code = "CM-301"


class ForbiddenProgramError(ProgramError):
    code = "CM-302"


class ExportError(ProgramError):
    code = "CM-303"


class TransportError(CrowdMeshError):
    code = "CM-400"


class FrameError(TransportError):
    code = "CM-401"


class AddressError(TransportError):
    code = "CM-402"


class StaleEpochError(TransportError):
    code = "CM-411"


class PeerLostError(TransportError):
    code = "CM-412"


class RunError(CrowdMeshError):
    code = "CM-500"


class ProtocolError(RunError):
    code = "CM-501"


class NonFiniteLossError(RunError):
    code = "CM-510"


class AgentLostError(RunError):
    code = "CM-511"


class InterruptedRunError(RunError):
    code = "CM-512"


class LaunchError(RunError):
    code = "CM-513"


class RecordError(RunError):
    code = "CM-520"


class EnvironmentFaultError(CrowdMeshError):
    code = "CM-600"


class MissingExtraError(EnvironmentFaultError, ImportError):
    code = "CM-601"


class ProfileCacheError(EnvironmentFaultError):
    code = "CM-602"
