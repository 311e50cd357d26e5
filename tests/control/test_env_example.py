from pathlib import Path

from control.env_example import agent_settings, render
from control.settings import AgentSettings

ROOT = Path(__file__).resolve().parents[2]


def test_env_example_is_up_to_date():
    assert (ROOT / ".env.example").read_text() == render(), "run `make env-example`"


def test_every_setting_of_the_agent_has_a_description_and_its_default():
    found = {name: (default, description) for name, default, description in agent_settings()}
    assert found.keys() == {f"AGENT_{name.upper()}" for name in AgentSettings.model_fields}
    assert all(description for _, description in found.values())
    assert found["AGENT_PORT"][0] == str(AgentSettings.model_fields["port"].default)
    assert found["AGENT_PLAN"][0] == "GRADSERVE_HOME/plan.json", "computed at start, so named by its rule"


def test_no_setting_is_set_by_the_example_itself():
    lines = [line for line in render().splitlines() if line]
    assert all(line.startswith("#") for line in lines)
