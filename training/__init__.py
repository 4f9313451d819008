import sys

# OpenVINO's wheel tells Google Analytics of every import and keeps an id in the home folder; without this module of its
# it does neither. A host of patients' data reports to nobody
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
