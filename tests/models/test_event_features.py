"""DLRM_IFA with all features that events, items and candidates can have, compared with plain sums."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ifa_torchrec import DLRM_IFA, DLRM_IFAConfig, IFAConfig
from ifa_torchrec.batch import RankingFeatures, Scale
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.models.parts import NumberArch
from ifa_torchrec.modules import INTERACTIONS, CandidateSetConfig
from ifa_torchrec.modules.projections import ZeroLinear

DIM = 8
ROWS = {"item": 9, "category": 4, "action": 3, "place": 5}
KEYS = {
    "item": ("hist_iid", "cand_iid"),
    "category": ("hist_cat", "cand_cat"),
    "action": ("hist_action",),
    "place": ("cand_place",),
}
HISTORIES, CANDIDATES, ITEMS = (4, 0, 3), (2, 3, 1), 6
EVENTS, ASKED = sum(HISTORIES), sum(CANDIDATES)

every_interaction = pytest.mark.parametrize("interaction", INTERACTIONS)


def make_config(interaction: str = "ifa", **changes) -> DLRM_IFAConfig:
    fields = {
        "item_features": {name: KEYS[name] for name in ("item", "category")},
        "event_features": {"action": "hist_action"},
        "candidate_features": {"place": "cand_place"},
        "dense_in_features": 1,
        "candidate_dense_in_features": 1,
        "item_dense_in_features": 2,
        "event_dense_in_features": 1,
        "item_vectors": {"text": 3, "image": 2},
        "scales": {"item_dense": (Scale(2.0, 0.5), Scale(1.0, 2.0, log=True))},
        "ifa": IFAConfig(DIM, num_heads=2, identity_features=("item",), gates={"action": 3}),
        "interaction": interaction,
    }
    return DLRM_IFAConfig(**{**fields, **changes})


def make_model(interaction: str = "ifa", width: int = 12, **changes) -> DLRM_IFA:
    """A model whose tables have other widths than D."""
    torch.manual_seed(0)
    keys = KEYS if interaction != "none" else {n: k[-1:] for n, k in KEYS.items() if n != "action"}
    tables = [
        EmbeddingConfig(
            name=name, embedding_dim=width, num_embeddings=ROWS[name], feature_names=list(names)
        )
        for name, names in keys.items()
    ]
    bags = [
        EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(name=n, embedding_dim=d, num_embeddings=7, feature_names=[n])
                for n, d in widths.items()
            ]
        )
        for widths in ({"store": DIM, "interest": 4}, {"genre": 4, "tag": DIM})
    ]
    model = DLRM_IFA(
        (bags[0], bags[1]), EmbeddingCollection(tables=tables), make_config(interaction, **changes)
    )
    for module in model.modules():
        if isinstance(module, NumberArch):
            torch.nn.init.normal_(module.missing)  # it starts at 0, which could hide an error
    return model


def jagged(lists: dict[str, list[list[int]]]) -> KeyedJaggedTensor:
    return KeyedJaggedTensor.from_lengths_sync(
        keys=list(lists),
        values=torch.tensor([i for rows in lists.values() for row in rows for i in row]).long(),
        lengths=torch.tensor([len(row) for rows in lists.values() for row in rows]),
    )


def make_features() -> RankingFeatures:
    """Items 4 and 5 are new: both have row 0, but different item ids."""
    g = torch.Generator().manual_seed(1)
    history_items = torch.tensor([0, 1, 4, 2, 3, 4, 5])
    candidate_items = torch.tensor([4, 1, 5, 2, 0, 5])
    row = torch.tensor([1, 2, 3, 8, 0, 0])
    rows = {"hist_iid": row[history_items], "cand_iid": row[candidate_items]}
    for key, name in (("hist_cat", "category"), ("hist_action", "action")):
        rows[key] = torch.randint(ROWS[name], (EVENTS,), generator=g)
    for key, name in (("cand_cat", "category"), ("cand_place", "place")):
        rows[key] = torch.randint(ROWS[name], (ASKED,), generator=g)
    lengths = [HISTORIES if key.startswith("hist") else CANDIDATES for key in rows]
    number = torch.tensor([11, 12, 13, 18, 21, 22])
    item_dense = torch.rand(ITEMS, 2, generator=g)
    item_dense[1, 0] = item_dense[3, 1] = math.nan
    history_dense = torch.randn(EVENTS, 1, generator=g)
    history_dense[2] = math.nan
    return RankingFeatures(
        dense_features=torch.tensor([[0.5], [math.nan], [2.0]]),
        context_features=jagged({"store": [[1], [2], [0]], "interest": [[], [3, 4, 4], [6]]}),
        sequence_features=KeyedJaggedTensor.from_lengths_sync(
            keys=list(rows),
            values=torch.cat(list(rows.values())),
            lengths=torch.tensor(lengths).flatten(),
        ),
        candidate_dense=torch.tensor([[1.0], [2.0], [math.nan], [0.0], [-1.0], [3.0]]),
        history_age=10 * torch.rand(EVENTS, generator=g),
        history_weight=torch.rand(EVENTS, generator=g) + 0.5,
        history_dense=history_dense,
        item_lists=jagged({"genre": [[], [1, 2], [3], [], [4, 4], [5]], "tag": [[i] for i in range(6)]}),
        item_dense=item_dense,
        item_vectors=torch.randn(ITEMS, 5, generator=g),
        history_items=history_items,
        candidate_items=candidate_items,
        history_item_ids=number[history_items],
        candidate_item_ids=number[candidate_items],
    )


def arguments_of_interaction(model: DLRM_IFA, features: RankingFeatures) -> tuple:
    caught = []
    module = model.candidate_arch.sequence_interaction
    handle = module.register_forward_pre_hook(lambda *given: caught.append(given[1:]), with_kwargs=True)
    model(features)
    handle.remove()
    [(arguments, options)] = caught
    return arguments, options


class TestNumberArch:
    def test_columns_by_their_scales_and_what_is_missing_by_its_own_number(self) -> None:
        arch = NumberArch("item_dense", (Scale(10.0, 2.0), Scale(1.0, 0.5, log=True)))
        with torch.no_grad():
            arch.missing.copy_(torch.tensor([7.0, -7.0]))
        given = torch.tensor([[14.0, math.nan], [math.nan, math.e**3 - 1]])
        torch.testing.assert_close(arch(given), torch.tensor([[2.0, -7.0], [7.0, 4.0]]))

    def test_what_is_missing_is_learnt_for_each_column(self) -> None:
        arch = NumberArch("item_dense", (Scale(), Scale()))
        arch(torch.tensor([[math.nan, 1.0], [math.nan, math.nan], [0.0, 2.0]])).sum().backward()
        assert arch.missing.grad.tolist() == [2.0, 1.0]

    @pytest.mark.parametrize("number", [-1.0, -5.0])
    def test_a_number_without_a_logarithm_is_refused(self, number: float) -> None:
        arch = NumberArch("history_dense", (Scale(), Scale(log=True)))
        with pytest.raises(ValueError, match=rf"history_dense: row 2, column 1 is {number:g}"):
            arch(torch.tensor([[-9.0, 0.0], [-9.0, math.nan], [0.0, number]]))

    def test_no_cast_and_no_meta_device_changes_a_figure(self) -> None:
        scales = (Scale(1_700_000_000.0, 86_400.0),)
        given = torch.tensor([[1_700_000_000.0 + 2 * 86_400.0]])
        assert NumberArch("dense_features", scales).bfloat16()(given).item() == pytest.approx(
            2, abs=0.02
        )
        with torch.device("meta"):
            arch = NumberArch("dense_features", scales)
        arch.to_empty(device="cpu")
        arch.reset_parameters()
        assert arch(given).item() == pytest.approx(2, abs=0.002)


class TestTokens:
    """The inputs of the interaction."""

    @staticmethod
    def parts(model: DLRM_IFA, features: RankingFeatures) -> tuple[Tensor, Tensor]:
        """The tokens of events and of candidates, summed by hand."""
        tables = model.sequence_arch.embedding_collection.embeddings
        projections = model.sequence_arch.projections.linears
        sequences = features.sequence_features

        def looked_up(name: str, key: str) -> Tensor:
            return tables[name].weight[sequences[key].values()] @ projections[name].weight.T

        arch = model.candidate_arch
        bags = model.item_sparse_arch.embedding_bag_collection.embedding_bags
        projection = model.item_sparse_arch.projections.linears["genre"].weight
        items = []
        for item in range(ITEMS):
            genres = features.item_lists["genre"].to_dense()[item].long()
            tags = features.item_lists["tag"].to_dense()[item].long()
            part = projection @ bags["genre"].weight[genres].sum(0) + bags["tag"].weight[tags].sum(0)
            items.append(part + arch.item_arch.vector_proj.weight @ features.item_vectors[item])
        items = torch.stack(items) + arch.item_arch.number_arch(features.item_dense)
        events = looked_up("item", "hist_iid") + looked_up("category", "hist_cat")
        events = events + looked_up("action", "hist_action") + items[features.history_items]
        events = events + arch.event_dense_arch(features.history_dense)
        asked = looked_up("item", "cand_iid") + looked_up("category", "cand_cat")
        asked = asked + looked_up("place", "cand_place") + items[features.candidate_items]
        return arch.token_norm(events), arch.token_norm(asked)

    @torch.no_grad()
    def test_they_are_sums_of_all_parts(self) -> None:
        model, features = make_model(), make_features()
        (candidates, history, age, history_ids, candidate_ids), options = arguments_of_interaction(
            model, features
        )
        events, asked = self.parts(model, features)
        torch.testing.assert_close(history.values(), events)
        torch.testing.assert_close(candidates.values(), asked)
        assert torch.equal(history.weights(), features.history_weight)
        assert candidates.weights_or_none() is None
        assert torch.equal(age, features.history_age)
        # the item's own id, although its row is 0
        assert history_ids.flatten().tolist() == [11, 12, 21, 13, 18, 21, 22]
        assert candidate_ids.flatten().tolist() == [21, 12, 22, 13, 11, 22]
        gates = features.sequence_features["hist_action"].values()
        assert torch.equal(options["history_gates"], gates[:, None])

    def test_without_true_numbers_rows_are_compared(self) -> None:
        model, features = make_model(), make_features()
        features.history_item_ids = features.candidate_item_ids = None
        (*_, history_ids, candidate_ids), _ = arguments_of_interaction(model, features)
        assert history_ids.flatten().tolist() == [1, 2, 0, 3, 8, 0, 0]
        assert candidate_ids.flatten().tolist() == [0, 2, 0, 3, 1, 0]

    def test_without_gates_none_are_passed(self) -> None:
        model = make_model(ifa=IFAConfig(DIM, num_heads=2))
        assert arguments_of_interaction(model, make_features())[1] == {}


@every_interaction
class TestEveryInteraction:
    def test_gradients_reach_all_parameters_and_no_vector(self, interaction: str) -> None:
        model, features = make_model(interaction), make_features()
        for module in model.modules():
            if isinstance(module, ZeroLinear):  # it outputs 0 before the first step
                torch.nn.init.normal_(module.weight)
        logits = model(features)
        assert logits.shape == (ASKED, 1) and logits.isfinite().all()
        logits.square().sum().backward()
        without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        # a single event of weight 0 or value "unknown" may be unused
        assert [name for name in without if "gates" not in name] == []
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert features.item_vectors.grad is None

    def test_parts_reach_the_logits(self, interaction: str) -> None:
        model = make_model(interaction)
        with torch.no_grad():
            before = model(make_features())
            changes = {"item_dense": 1.0, "item_vectors": 1.0}
            if interaction not in ("none",):
                changes |= {"history_dense": 1.0}
            for name, amount in changes.items():
                features = make_features()
                getattr(features, name).add_(amount)
                assert not torch.allclose(model(features), before), name

    def test_a_batch_of_nothing(self, interaction: str) -> None:
        """Like a rank that got no request."""
        model, none = make_model(interaction), torch.zeros(0, dtype=torch.int64)
        keys = make_features().sequence_features.keys()
        zeros = torch.zeros(len(keys), dtype=torch.int64)
        features = RankingFeatures(
            torch.zeros(1, 1),
            jagged({"store": [[]], "interest": [[]]}),
            KeyedJaggedTensor.from_lengths_sync(keys=keys, values=none, lengths=zeros),
            torch.zeros(0, 1),
            torch.zeros(0),
            history_weight=torch.zeros(0),
            history_dense=torch.zeros(0, 1),
            item_lists=jagged({"genre": [[]], "tag": [[]]}),
            item_dense=torch.zeros(1, 2),
            item_vectors=torch.zeros(1, 5),
            history_items=none,
            candidate_items=none,
        )
        model(features).sum().backward()
        dense = [*model.candidate_arch.parameters(), *model.set_arch.parameters()]
        assert all(p.grad is not None and not p.grad.any() for p in dense)


def test_an_event_of_weight_0_is_as_good_as_not_there() -> None:
    model, features = make_model(), make_features()
    features.history_weight[3] = 0.0
    with torch.no_grad():
        before = model(features)
        features.history_dense[3] = 100.0
        torch.testing.assert_close(model(features), before)


@torch.no_grad()
def test_from_a_state_the_scores_are_those_of_the_histories() -> None:
    model = make_model(candidate_set=CandidateSetConfig("softmax"))
    features = make_features()
    state = model.encode(features)
    torch.testing.assert_close(model.attend(features, state), model(features), rtol=0, atol=1e-6)


def test_keys_are_a_map_or_follow_from_names() -> None:
    assert make_config().history_keys == {n: k[0] for n, k in KEYS.items() if n != "place"}
    assert make_config().candidate_keys == {n: k[-1] for n, k in KEYS.items() if n != "action"}
    named = make_config(
        item_features=("item",), event_features=("action",), candidate_features=("place",)
    )
    assert named.history_keys == {"item": "history_item", "action": "history_action"}
    assert named.candidate_keys == {"item": "candidate_item", "place": "candidate_place"}
    assert make_config("none").history_keys == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item_features": "item"}, "item_features must be a tuple of names"),
        ({"item_features": {}}, "item_features must be a tuple of names"),
        ({"item_features": {"item": "hist_iid"}}, "item_features must map each name to a pair of keys"),
        ({"item_features": {"item": ("iid", "iid")}}, "the key 'iid' is given twice"),
        ({"event_features": {"item": "hist_action"}}, "the name 'item' is given twice"),
        ({"event_features": "action"}, "event_features must be a tuple of names"),
        (
            {"event_features": ("kind",)},
            r"gates \['action'\] must be among the event_features \['kind'\]",
        ),
        ({"search_feature": "place"}, r"search_feature \['place'\] must be among the item_features"),
        ({"item_dense_in_features": -1}, "item_dense_in_features must be 0 or more, got -1"),
        ({"item_vectors": {"text": 0}}, r"item_vectors\['text'\] must be 1 or more"),
        ({"scales": {"item_dense": (Scale(),)}}, "item_dense has 1 scales, but .* is 2"),
        ({"scales": {"numbers": ()}}, "scales are for the fields .* got 'numbers'"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**change)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("history_dense", None, "history_dense is None, but the model takes 1 columns"),
        ("history_dense", torch.zeros(EVENTS - 1, 1), "history_dense has 6 rows for 7 events"),
        ("history_dense", torch.zeros(EVENTS, 2), "history_dense has 2 columns, but the model takes 1"),
        ("item_dense", None, "item_dense is None"),
        ("item_dense", torch.zeros(ITEMS + 1, 2), "item_dense has 7 rows for 6 items"),
        ("item_vectors", torch.zeros(ITEMS, 4), "item_vectors has 4 columns, but the model takes 5"),
        ("item_lists", None, r"tables for \['genre', 'tag'\]; pass"),
        ("history_items", None, "history_items is None"),
        (
            "candidate_items",
            torch.full((ASKED,), ITEMS),
            "candidate_items has 6, but items are 0 to 5",
        ),
        ("history_items", torch.full((EVENTS,), -1), "history_items has -1"),
        ("history_items", torch.zeros(EVENTS), r"history_items must be \[7\] int64.*float32"),
        ("candidate_item_ids", torch.zeros(2).long(), r"candidate_item_ids must be \[6\] int64"),
        ("history_weight", torch.ones(3), r"history_weight is \[3\] for 7 events"),
        ("history_weight", torch.full((EVENTS,), -1.0), "weight that is negative"),
        ("history_age", torch.zeros(3), "history_"),
        ("candidate_dense", torch.zeros(3, 1), "candidate_"),
    ],
    ids=str,
)
def test_features_that_do_not_fit_are_refused(name: str, value: Tensor | None, message: str) -> None:
    features = dataclasses.replace(make_features(), **{name: value})
    with pytest.raises(ValueError, match=message):
        make_model()(features)


def test_lists_with_weights_are_refused() -> None:
    features = make_features()
    lists = features.item_lists
    features.item_lists = KeyedJaggedTensor(
        lists.keys(), lists.values(), torch.rand(len(lists.values())), lists.lengths()
    )
    with pytest.raises(ValueError, match="item_lists has weights"):
        make_model()(features)


def test_an_event_feature_without_a_table_is_refused() -> None:
    with pytest.raises(ConfigError, match="no feature 'hist_device'"):
        make_model(event_features={"action": "hist_action", "device": "hist_device"})
