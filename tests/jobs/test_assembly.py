"""Which parts may stand around a transformer in a pipeline's folder, and what is said about calling it."""

import inspect
import logging
from types import SimpleNamespace

import pytest

from jobs import assembly
from pixart_data.errors import ConfigError
from pixart_model.sizes import Model
from pixart_model.weights import Weights

PLACE = assembly._Place("some/model", None, None, None)


def weights(**facts):
    features = {"image": {"model": {"id": "tiny/vae", **facts}}, "text": {"policy": {"cleaning": "whitespace-1"}}}
    return Weights({}, Model(size="tiny"), None, features if facts else None, None, "runs/x")


def match(known, scaling_factor=0.18215, shift_factor=None):
    encoder = SimpleNamespace(config=SimpleNamespace(d_model=4096))
    vae = SimpleNamespace(latent_channels=4, scaling_factor=scaling_factor, shift_factor=shift_factor)
    assembly._require_match(known, encoder, SimpleNamespace(config=vae), PLACE, PLACE)


def test_a_vae_of_another_scale_than_the_features_is_refused():
    known = weights(scaling_factor=0.18215, shift_factor=0.0)
    match(known)
    words = "vae: expected scaling_factor 0.18215, as .* runs/x .*, found 0.13025 in some/model; give .* --set vae=ID"
    with pytest.raises(ConfigError, match=words):
        match(known, scaling_factor=0.13025)
    match(weights(), scaling_factor=0.13025)  # nothing is known


def test_a_vae_of_another_shift_than_the_features_is_refused():
    with pytest.raises(ConfigError, match="vae: expected shift_factor 0.1, .* found 0.0 in some/model"):
        match(weights(scaling_factor=0.18215, shift_factor=0.1))
    with pytest.raises(ConfigError, match="vae: expected shift_factor 0.0, .* found 0.1 in some/model"):
        match(weights(scaling_factor=0.18215, shift_factor=0.0), shift_factor=0.1)
    with pytest.raises(ConfigError, match="vae: expected no shift_factor, which PixArtAlphaPipeline leaves out"):
        match(weights(scaling_factor=0.18215, shift_factor=0.1), shift_factor=0.1)


def test_it_is_said_that_captions_are_not_to_be_cleaned(caplog):
    """By default the pipeline does to prompts what was not done to captions."""
    with caplog.at_level(logging.WARNING):
        assembly._say(weights())
        assert "clean_caption" not in caplog.text  # published weights were trained with it
        assembly._say(weights(scaling_factor=0.18215))
    assert "call the pipeline with clean_caption=False: " in caplog.text
    assert "lower-cases them all the same" in caplog.text


def test_the_pipeline_does_what_is_said_of_it():
    pipeline = pytest.importorskip("diffusers").PixArtAlphaPipeline
    assert inspect.signature(pipeline.__call__).parameters["clean_caption"].default is True
    assert pipeline._text_preprocessing(None, "No. 7 <b>", clean_caption=False) == ["no. 7 <b>"]
