import warnings
from pathlib import Path

import mlflow
import numpy as np

from handlers.engines import softmax
from training.data.images import load_training_images
from training.evaluate.inference import predict_logits
from training.package.artifacts import read_model
from training.tracking.store import tracking_uri

SAMPLES = Path(__file__).parents[2] / "samples"


def test_mlflow_loads_the_model_and_it_answers_as_its_network(registered, cache):
    mlflow.set_tracking_uri(tracking_uri())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's own, about type hints
        loaded = mlflow.pyfunc.load_model(f"models:/cifar10/{registered.number}")
    images, size = load_training_images(f"imagefolder:{SAMPLES}", cache)
    logits = predict_logits(read_model(registered.folder)[1], images.images, size).numpy()
    np.testing.assert_allclose(loaded.predict(images.images), softmax(logits, 1.0), atol=1e-5)
