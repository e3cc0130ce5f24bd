"""tfaccel: faster, smaller, deployable Keras 3 models on TensorFlow, in an ordinary `model.fit`."""

from tfaccel import launch
from tfaccel.accelerator import Accelerator
from tfaccel.batch_size import BatchSizes, find_batch_size, scale_learning_rate
from tfaccel.export.benchmark import Latency, benchmark_tflite
from tfaccel.export.callback import ExportTFLite
from tfaccel.export.compare import Parity, compare
from tfaccel.export.errors import ExportError
from tfaccel.export.file import TFLiteFile
from tfaccel.export.report import LayerReport, LayerRow, layer_report
from tfaccel.export.scoring import Score
from tfaccel.export.search import AutoRecipe, SearchReport
from tfaccel.export.tflite import export_tflite
from tfaccel.export.trials import Trial
from tfaccel.fast_kernels.predictor import predictor
from tfaccel.fit import schedules
from tfaccel.fit.cluster_weights import ClusterWeights
from tfaccel.fit.compression_report import CompressionReport, CompressionRow, compression_report
from tfaccel.fit.distill import Distill
from tfaccel.fit.find_learning_rate import find_learning_rate
from tfaccel.fit.layer_learning_rates import LayerLearningRates
from tfaccel.fit.learning_rate import LearningRate, OneCycle, WarmupCosine
from tfaccel.fit.learning_rate_curve import LearningRateCurve
from tfaccel.fit.plateau import Plateau
from tfaccel.fit.profile import Profile
from tfaccel.fit.profile_report import ProfileReport
from tfaccel.fit.prune_weights import PruneWeights
from tfaccel.fit.quantize_aware import QuantizeAware
from tfaccel.fit.schedule_plot import plot_schedule
from tfaccel.fit.sensitivity import SensitivityReport, SensitivityRow, sensitivity
from tfaccel.fit.sparsity_schedule import PruningSchedule
from tfaccel.fit.throughput import Throughput
from tfaccel.fit.unfreeze_layers import UnfreezeLayers
from tfaccel.prepare.devices import Devices
from tfaccel.prepare.gpu_memory import limit_gpu_memory
from tfaccel.prepare.memory import MemoryEstimate, estimate_memory
from tfaccel.tuned_options import TunedOptions
from tfaccel.tuning import tune

__version__ = "0.1.0"

__all__ = [
    "Accelerator",
    "AutoRecipe",
    "BatchSizes",
    "ClusterWeights",
    "CompressionReport",
    "CompressionRow",
    "Devices",
    "Distill",
    "ExportError",
    "ExportTFLite",
    "Latency",
    "LayerLearningRates",
    "LayerReport",
    "LayerRow",
    "LearningRate",
    "LearningRateCurve",
    "MemoryEstimate",
    "OneCycle",
    "Parity",
    "Plateau",
    "Profile",
    "ProfileReport",
    "PruneWeights",
    "PruningSchedule",
    "QuantizeAware",
    "Score",
    "SearchReport",
    "SensitivityReport",
    "SensitivityRow",
    "TFLiteFile",
    "Throughput",
    "Trial",
    "TunedOptions",
    "UnfreezeLayers",
    "WarmupCosine",
    "benchmark_tflite",
    "compare",
    "compression_report",
    "estimate_memory",
    "export_tflite",
    "find_batch_size",
    "find_learning_rate",
    "launch",
    "layer_report",
    "limit_gpu_memory",
    "plot_schedule",
    "predictor",
    "scale_learning_rate",
    "schedules",
    "sensitivity",
    "tune",
]
