"""When an asset renews itself, for those where a condition says it better than a schedule.

Dagster evaluates them in the sensor `default_automation_condition_sensor`, which is off until a person switches it on.
Nothing that takes the GPU pool has a condition.
"""

from dagster import AutomationCondition

# `eager()` would fire on every run of an input, also on one that changed nothing: a data version is what counts here.
# An update in the same tick as the asset's own can be lost; the next one, or a run by hand, takes it along.
renewed_with_inputs = (
    AutomationCondition.any_deps_match(AutomationCondition.data_version_changed()).since_last_handled()
    & ~AutomationCondition.any_deps_in_progress()
    & ~AutomationCondition.in_progress()
    & AutomationCondition.all_deps_blocking_checks_passed()
).with_label("renewed_with_inputs")
"""Cheap reports: made anew once the data of an input has changed and no contract on it is broken."""
