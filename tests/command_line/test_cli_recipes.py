"""Recipes and the command line."""

import yaml
from command_runs import OPTIONS, succeed, weights


def test_the_recipe_in_the_folder_says_what_was_used(model):
    recipe = yaml.safe_load((model / "recipe.yaml").read_text("utf-8"))
    machine = {"use_cpu"}
    assert {name: recipe[name] for name in OPTIONS.keys() - machine} == {
        name: value for name, value in OPTIONS.items() if name not in machine
    }
    assert not machine & recipe.keys()
    # The recipe also has defaults and values that were derived from the data, but not the folders of this run.
    assert recipe["train_windows"] == "proportional"
    assert recipe["max_position_embeddings"] == 50
    assert "output_dir" not in recipe


def test_the_recipe_of_a_model_trains_an_equal_one(model, data, tmp_path):
    config = model / "recipe.yaml"
    succeed("train", "--config", config, "--data", data, "--output_dir", tmp_path / "again")
    old, new = weights(model), weights(tmp_path / "again")
    assert old.keys() == new.keys()
    assert all(old[name].equal(new[name]) for name in old)
    again = tmp_path / "again" / "recipe.yaml"
    assert yaml.safe_load(again.read_text("utf-8")) == yaml.safe_load(config.read_text("utf-8"))


def test_the_command_line_overrides_the_recipe(model, data, tmp_path):
    config = model / "recipe.yaml"
    output = tmp_path / "model"
    # An option overrides the recipe before or after --config.
    succeed("train", "--mask_ratio", 0.5, "--config", config, "--data", data, "--output_dir", output, "--seed", 6)
    recipe = yaml.safe_load((output / "recipe.yaml").read_text("utf-8"))
    assert recipe == yaml.safe_load(config.read_text("utf-8")) | {"mask_ratio": 0.5, "seed": 6}
    assert not all(value.equal(weights(output)[name]) for name, value in weights(model).items())


def test_a_recipe_may_write_numbers_as_1e_3_and_name_the_folders(data, tmp_path):
    recipe = OPTIONS | {"data": str(data), "output_dir": str(tmp_path / "model"), "use_cpu": True}
    text = yaml.safe_dump({name: value for name, value in recipe.items() if name != "learning_rate"})
    (tmp_path / "recipe.yaml").write_text(text + "learning_rate: 1e-3\nmax_steps: 1\n")
    assert yaml.safe_load("1e-3") == "1e-3"  # YAML itself reads a string
    succeed("train", "--config", tmp_path / "recipe.yaml")
    assert yaml.safe_load((tmp_path / "model" / "recipe.yaml").read_text("utf-8"))["learning_rate"] == 0.001


def test_recipes_serve_the_other_commands_as_well(model, tmp_path):
    # The list at the end of the recipe must not take the model as a value.
    (tmp_path / "recipe.yaml").write_text("top_k: 1\ncandidates: [101, 105, 107]\n")
    assert len(succeed("recommend", model, 103, "--config", tmp_path / "recipe.yaml")) == 1
    lines = succeed("recommend", model, 103, "--config", tmp_path / "recipe.yaml", "--top_k", 5)
    assert sorted(line.split()[1] for line in lines) == ["101", "105", "107"]
    lines = succeed("recommend", model, 103, "--config", tmp_path / "recipe.yaml", "--top_k", 5, "--candidates", 106)
    assert [line.split()[1] for line in lines] == ["106"]


def test_a_recipe_names_items_as_they_are_written(model, tmp_path, caplog):
    # YAML reads 010 as 8, and 101 as a number.
    (tmp_path / "recipe.yaml").write_text("top_k: 2\nexclude: [010, 101]\n")
    lines = succeed("recommend", model, 103, "--config", tmp_path / "recipe.yaml")
    assert "the catalogue lacks 1 of the 2 excluded items: '010'" in caplog.text
    assert "101" not in [line.split()[1] for line in lines]
