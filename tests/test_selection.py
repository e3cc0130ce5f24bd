"""What is said of a selector that means no layer."""

from tfaccel.selection import no_match


def test_few_layers_are_all_named():
    assert "what matches one of dense, head." in str(no_match("haed", ["head", "dense", "dense"]))
    assert "no layer" in str(no_match("haed", []))


def test_of_many_layers_the_nearest_names_are_told():
    names = [f"block_{index}_conv" for index in range(200)]
    said = str(no_match("block_17_convolution", names))
    assert "one of the 200 layers, such as block_17_conv" in said
    assert said.count("block_") == 13
