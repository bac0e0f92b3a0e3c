# SPDX-License-Identifier: Apache-2.0
"""What all rules come to, and the one sentence that says it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from .outcome import SEVERITIES, STATUSES, Finding, Missing, NotChecked, Outcome, Severity, Status


@dataclass(frozen=True)
class Verdict:
    """What a report comes to, in a sentence, with the one thing to do.

    Attributes:
        status: That of the worst finding; without a problem, warning or note, whether all rules could be checked.
        sentence: The conclusion, in plain words.
        todo: The one thing to do; empty where there is nothing to do.
        more: What else there is: further findings, and rules that could not be checked; empty if there is nothing.
    """

    status: Status
    sentence: str
    todo: str
    more: str

    @property
    def conclusion(self) -> str:
        """The sentence, with its severity in front if it is a problem or a warning."""
        return f"{self.status.capitalize()}: {self.sentence}" if self.status in SEVERITIES[:2] else self.sentence

    def __str__(self) -> str:
        return " ".join(filter(None, (self.conclusion, self.todo, self.more)))


@dataclass(frozen=True)
class RuleStatus:
    """What came of one rule.

    Attributes:
        name: Its name.
        status: The severity of its finding; else whether it could be checked.
        missing: What was missing to check it; `None` if it was checked.
        because: Why it could not be checked, or why there is nothing to check; empty if it was.
        remedy: How it could be checked; empty if it was.
    """

    name: str
    status: Status
    missing: Missing | None
    because: str
    remedy: str

    @classmethod
    def of(cls, name: str, outcome: Outcome) -> RuleStatus:
        """Return the status of a rule with this outcome."""
        if isinstance(outcome, NotChecked):
            return cls(name, outcome.status, outcome.missing, outcome.reason, outcome.remedy)
        return cls(name, outcome.status, None, "" if isinstance(outcome, Finding) else outcome.because, "")


@dataclass(frozen=True)
class Diagnosis:
    """The outcomes of all rules.

    Attributes:
        outcomes: By the name of the rule, in the order of the rules.
    """

    outcomes: Mapping[str, Outcome]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings, worst first."""
        found = [outcome for outcome in self.outcomes.values() if isinstance(outcome, Finding)]
        return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))

    @property
    def rules(self) -> tuple[RuleStatus, ...]:
        """The status of each rule, those that need attention first."""
        found = [RuleStatus.of(name, outcome) for name, outcome in self.outcomes.items()]
        return tuple(sorted(found, key=lambda rule: STATUSES.index(rule.status)))

    @property
    def not_checked(self) -> tuple[NotChecked, ...]:
        """The outcomes of the rules that could not be checked."""
        return tuple(outcome for outcome in self.outcomes.values() if isinstance(outcome, NotChecked))

    @property
    def verdict(self) -> Verdict:
        """The conclusion: the worst finding, or how much can be said without one."""
        worst = next(iter(self.findings), None)
        if worst is not None and worst.severity != "note":
            others = Counter(finding.severity for finding in self.findings[1:])
            more = _sentence([*_counted(others), *self._unchecked()])
            return Verdict(worst.severity, worst.sentence, _first_sentence(worst.advice), more)
        notes = _sentence(_counted(Counter(finding.severity for finding in self.findings)))
        if not self.not_checked:
            status: Status = "fine" if worst is None else "note"
            return Verdict(status, f"No problem and no warning by all {len(self.outcomes)} rules.", "", notes)
        reasons = Counter(outcome.reason for outcome in self.not_checked).most_common()
        remedies = {outcome.reason: outcome.remedy for outcome in self.not_checked}
        [counted] = self._unchecked()
        shown = "; ".join(reason for reason, _ in reasons[:2])
        rest = f"; and {len(reasons) - 2} more reasons" if len(reasons) > 3 else "; and one more" * (len(reasons) == 3)
        nothing = len(self.not_checked) == len(self.outcomes)
        head = "No rule could be checked" if nothing else f"No problem and no warning, but {counted}"
        sentence = f"{head}: {shown}{rest}."
        todo = next((remedies[reason] for reason, _ in reasons if remedies[reason]), "")
        return Verdict("not_checked", sentence, todo, notes)

    def _unchecked(self) -> list[str]:
        """Return how many rules could not be checked, if any."""
        number = len(self.not_checked)
        return [f"{number} of {len(self.outcomes)} rules could not be checked"] if number else []


def _counted(severities: Mapping[Severity, int]) -> list[str]:
    """Return how many findings there are of each severity.

    Example:
        >>> _counted({"warning": 2, "note": 1})
        ['2 warnings', '1 note']
    """
    numbers = {severity: severities.get(severity, 0) for severity in SEVERITIES}
    return [f"{number} {severity}{'s' * (number > 1)}" for severity, number in numbers.items() if number]


def _sentence(parts: list[str]) -> str:
    return f"Also: {', '.join(parts)}." if parts else ""


def _first_sentence(text: str) -> str:
    """Return the first sentence of an advice.

    Example:
        >>> _first_sentence("Start again at 1.5e-3 or less. Do not aim at the limit: it moves.")
        'Start again at 1.5e-3 or less.'
    """
    return re.split(r"(?<=[.!?]) (?=[A-Z`])", text, maxsplit=1)[0]
