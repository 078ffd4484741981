import pytest
from panels import Query, empty_queries, filled, queries, variables


class Prometheus:
    """Answers with samples for the expressions it knows."""

    def __init__(self, samples=(), labels=()):
        self.samples, self.labels, self.asked = dict(samples), list(labels), []

    def __call__(self, path, **parameters):
        self.asked.append(parameters.get("query", path))
        if path != "query_range":
            return self.labels
        if "(((" in parameters["query"]:
            raise ValueError("parse error")
        return {"result": [{"values": [[0, value]]} for value in self.samples.get(parameters["query"], [])]}


def dashboard(*expressions, variables=()):
    targets = [{"expr": expression} for expression in expressions]
    return {"panels": [{"title": "Speed", "targets": targets}], "templating": {"list": list(variables)}}


MODEL = {"name": "model", "type": "query", "query": {"query": "label_values(headgate_stps, model)"}}


def test_queries_of_folded_rows_count():
    row = {"type": "row", "panels": dashboard("up")["panels"]}
    assert list(queries({"panels": [row, {"type": "text"}]})) == [Query("Speed", "up")]


@pytest.mark.parametrize("spelled", ["$model", "${model}", "${model:regex}", "[[model]]"])
def test_variables_are_filled_in_however_they_are_spelled(spelled):
    assert filled(f'x{{m="{spelled}"}}[$__rate_interval]', {"model": "a", "__rate_interval": "20s"}) == 'x{m="a"}[20s]'


def test_longer_name_is_not_mistaken_for_a_shorter_one():
    assert filled("$model_tier", {"model": "a", "model_tier": "b"}) == "b"


def test_variable_stands_for_everything_where_it_may():
    ask = Prometheus(labels=["a", "b"])
    assert variables(dashboard(variables=[MODEL]), ask)["model"] == "a"
    assert variables(dashboard(variables=[MODEL | {"includeAll": True}]), ask)["model"] == ".*"


def test_variable_without_values_is_a_fault():
    assert empty_queries(dashboard(variables=[MODEL]), Prometheus(), 0.0) == [
        "variable model: label_values(headgate_stps, model) has no values"
    ]


def test_query_that_finds_only_nan_or_fails_is_a_fault():
    ask = Prometheus({"good": ["1.5"], "bad": ["NaN", "+Inf"]})
    assert empty_queries(dashboard("good", "bad", "((("), ask, 0.0) == [
        "Speed: nothing for bad",
        "Speed: parse error in (((",
    ]
