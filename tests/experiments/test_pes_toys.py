from experiments import pes_toys


def test_smoke_prints_every_method_and_writes_the_figures(tmp_path, capsys):
    pes_toys.main(["--smoke", "--seeds", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for claim in (pes_toys.influence(4), pes_toys.landscape(4), pes_toys.accuracy(4)):
        for name in claim.methods:
            assert f"{claim.title} {claim.metric}" in " ".join(printed.split())
            assert name in printed
    assert {path.name for path in tmp_path.iterdir()} == {
        "influence_balancing.png",
        "learning_rate_on_a_landscape.png",
        "learning_rate_by_accuracy_on_digits.png",
    }


def test_pes_finds_the_optimum_and_truncated_leaves_it(tmp_path, capsys):
    whole = pes_toys.influence(1000)
    pes, backprop = whole.methods["PES"]._replace(high=0.15), whole.methods["truncated backprop, 1 step"]
    claim = whole._replace(methods={"PES": pes, "backprop": backprop})
    assert pes_toys.run([claim], 1, tmp_path, 5.0, iterations=250)
    assert "NO" not in capsys.readouterr().out
    wrong = claim._replace(methods={"backprop": backprop._replace(low=0.0, high=0.15)})
    assert not pes_toys.run([wrong], 1, tmp_path, 5.0, iterations=20)
    assert "NO" in capsys.readouterr().out


def test_a_spent_budget_cuts_a_run_short():
    claim = pes_toys.influence(4)
    points = list(pes_toys.train(claim, "PES", 1000, 0, seconds=0.0))
    assert points[-1].iteration < 1000
