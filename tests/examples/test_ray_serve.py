"""The example for Ray Serve answers as the pipeline does, from a replica that builds the application itself."""

import httpx
import pytest
from scripts import EXAMPLES, import_script
from served import as_json_has_it, make_served_parts

from mm_transformers.model.pipeline_mm_transformer import MultimodalPipeline


pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")


@pytest.mark.slow
def test_a_replica_answers_as_the_pipeline(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    model, processor = make_served_parts()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    expected = MultimodalPipeline(model=model, processor=processor)("a red dog", tasks=["topic"])
    example = import_script(EXAMPLES / "serve" / "ray_serve.py")
    try:
        serve.run(example.build({"model": str(tmp_path), "cpus": "0.5"}))
        body = {"rows": ["a red dog"], "tasks": ["topic"]}
        answered = httpx.post("http://127.0.0.1:8000/predict", json=body, timeout=60)
        assert answered.status_code == 200, answered.text
        [answer] = answered.json()["answers"]
        assert answer["topic"]["label"] == expected["topic"]["label"]
        assert answer["topic"]["score"] == pytest.approx(as_json_has_it(expected)["topic"]["score"], abs=1e-5)
        refused = httpx.post("http://127.0.0.1:8000/predict", json={"rows": [{"image": "/etc/passwd"}]}, timeout=60)
        assert refused.status_code == 400
    finally:
        serve.shutdown()
        __import__("ray").shutdown()
