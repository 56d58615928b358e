#include "manifest.hpp"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>

#include "preprocess.hpp"
#include "sha256.hpp"
#include "text.hpp"

namespace vitprune {
namespace {

using Json = nlohmann::json;
namespace fs = std::filesystem;

constexpr int SCHEMA = 1;
constexpr auto REBUILD = "run the build again, it renews what is damaged";
// what Python's reader demands too, so that both refuse the same manifests
constexpr const char* KEYS[] = {"verdict", "reasons", "device", "versions", "dense",
                                "pruned",  "budget",  "parity", "engines",  "files"};

Json read(const fs::path& folder, const fs::path& path) {
  if (!fs::is_directory(folder)) throw InputError(text(folder.string(), ": there is no such folder"));
  if (!fs::is_regular_file(path))
    throw DamagedFile(text(path.string(), " is missing: the build did not finish; run the same command again"));
  std::ifstream file(path, std::ios::binary);
  Json plain = Json::parse(file, nullptr, /*allow_exceptions=*/false);
  if (plain.is_discarded()) throw DamagedFile(text(path.string(), " is cut off or no JSON; ", REBUILD));
  return plain;
}

[[noreturn]] void damaged(const fs::path& path, const std::string& key) {
  throw DamagedFile(text(path.string(), " is damaged at ", key, "; ", REBUILD));
}

void check_schema(const Json& plain, const fs::path& path) {
  if (!plain.is_object()) damaged(path, "its start");
  const auto schema = plain.find("schema");
  if (schema != plain.end() && !schema->is_number_integer()) damaged(path, "schema");
  if (schema != plain.end() && *schema > SCHEMA)
    throw InputError(text(path.string(), " is of schema ", schema->dump(), ", this vitprune reads up to ", SCHEMA,
                          ": update it"));
  for (const auto* key : KEYS)
    if (!plain.contains(key)) damaged(path, key);
}

/// A key's value as text, as ONNX Runtime wants its options.
std::string option_text(const Json& value) {
  if (value.is_boolean()) return value.get<bool>() ? "1" : "0";
  return value.is_string() ? value.get<std::string>() : value.dump();
}

/// Our short name of a provider: cpu for CPUExecutionProvider, and likewise.
std::string provider_name(std::string name) {
  std::transform(name.begin(), name.end(), name.begin(), [](unsigned char letter) { return std::tolower(letter); });
  return name.substr(0, name.rfind("executionprovider"));
}

void read_options(const Json& options, Engine& engine, const fs::path& path) {
  for (const auto& [key, value] : options.items()) {
    if (key == "provider") {
      engine.provider = provider_name(value.get<std::string>());
    } else if (key == "provider_options") {
      for (const auto& [name, option] : value.items()) engine.provider_options[name] = option_text(option);
    } else if (key == "precision") {
      engine.computes = value.get<std::string>();
    } else if (key == "device") {
      engine.device = value.get<std::string>();
    } else if (key == "sizes") {
      engine.sizes = value.get<std::map<std::string, std::int64_t>>();
    } else if (key != "cpu_nodes" && key != "copies") {  // those concern checks and timings of the build
      throw NotSupported(text(path.string(), " has the option ", key, " for ", engine.runtime,
                              ", which this library does not know; update it"));
    }
  }
}

/// A number of images that may be missing or null.
std::size_t read_batch(const Json& plain, const char* key, std::size_t otherwise, const fs::path& path) {
  const auto found = plain.find(key);
  if (found == plain.end() || found->is_null()) return otherwise;
  if (!found->is_number_unsigned() || *found == 0) damaged(path, text("engines.", key));
  return found->get<std::size_t>();
}

Engine read_engine(const Json& plain, const fs::path& path) {
  Engine engine;
  engine.runtime = plain.at("runtime").get<std::string>();
  engine.precision = plain.at("precision").get<std::string>();
  engine.status = plain.at("status").get<std::string>();
  engine.file = plain.value("file", "model.onnx");
  engine.max_batch = read_batch(plain, "max_batch", 0, path);
  engine.min_batch = read_batch(plain, "min_batch", 1, path);
  engine.compiled = plain.value("compiled", false);
  read_options(plain.value("options", Json::object()), engine, path);
  return engine;
}

Preprocess read_preprocess(const Json& plain) {
  Preprocess found;
  const auto size = plain.at("input_size").get<std::vector<std::size_t>>();
  if (size.size() != 3) throw InputError(text("preprocess: input_size must have 3 numbers, got ", size.size()));
  found.channels = size[0], found.height = size[1], found.width = size[2];
  found.interpolation = plain.at("interpolation").get<std::string>();
  found.mean = plain.at("mean").get<std::vector<double>>();
  found.deviation = plain.at("std").get<std::vector<double>>();
  found.crop_pct = plain.at("crop_pct").get<double>();
  found.crop_mode = plain.at("crop_mode").get<std::string>();
  check(found);
  return found;
}

/// The major version of the Pillow that the model was validated with, where the manifest tells.
int pillow_version(const Json& versions, int otherwise) {
  const auto found = versions.value("pillow", std::string());
  return found.empty() ? otherwise : std::atoi(found.c_str());
}

bool is_onnx(const Engine& engine) { return fs::path(engine.file).extension() == ".onnx"; }

bool is_plan(const Engine& engine) { return fs::path(engine.file).extension() == ".plan"; }

}  // namespace

Manifest Manifest::load(const fs::path& folder) {
  const fs::path path = folder / "manifest.json";
  const Json plain = read(folder, path);
  check_schema(plain, path);
  if (!plain.contains("preprocess") || !plain["preprocess"].is_object())
    throw DamagedFile(text(path.string(), " does not say how images are preprocessed; run the build again"));
  Manifest manifest;
  manifest.folder_ = folder;
  std::string at;
  try {
    at = "engines";
    for (const auto& engine : plain[at]) manifest.engines_.push_back(read_engine(engine, path));
    at = "files";
    manifest.sums_ = plain[at].get<std::map<std::string, std::string>>();
    at = "preprocess";
    manifest.preprocess_ = read_preprocess(plain[at]);
    at = "versions";
    manifest.preprocess_.pillow = pillow_version(plain[at], manifest.preprocess_.pillow);
    at = "classes";
    if (plain.contains(at) && !plain[at].is_null())
      manifest.classes_ = std::make_shared<std::vector<std::string>>(plain[at].get<std::vector<std::string>>());
  } catch (const Json::exception&) {
    damaged(path, at);
  }
  return manifest;
}

const Engine& Manifest::engine(const std::string& runtime) const {
  for (const auto& engine : engines_)
    if (!engine.compiled && (runtime.empty() ? engine.status == "run" : engine.runtime == runtime)) return engine;
  if (runtime == "openvino")
    for (const auto& engine : engines_)
      if (engine.runtime == "onnxruntime" && is_onnx(engine) && !engine.compiled) return engine;
  std::vector<std::string> there;
  for (const auto& engine : engines_)
    there.push_back(text(engine.runtime, " (", engine.precision, ", ", engine.status, ")"));
  const auto wanted = runtime.empty() ? "no engine that was run when it was built" : text("no engine for '", runtime, "'");
  throw InputError(text(folder_.string(), " has ", wanted, "; it has ", there.empty() ? "none" : joined(there),
                        ": name one of these runtimes"));
}

std::vector<std::string> Manifest::files_of(const Engine& engine) const {
  const std::string beside = fs::path(engine.file).replace_extension(".json").generic_string();
  std::vector<std::string> found;
  for (const auto& [name, sum] : sums_)
    if (name.compare(0, engine.file.size(), engine.file) == 0 || (is_plan(engine) && name == beside))
      found.push_back(name);
  return found.empty() ? std::vector<std::string>{engine.file} : found;
}

void Manifest::check_file(const std::string& name) const {
  const auto sum = sums_.find(name);
  const auto path = (folder_ / name).string(), manifest = (folder_ / "manifest.json").string();
  if (sum == sums_.end()) throw DamagedFile(text(manifest, " names no ", name, "; ", REBUILD));
  const fs::path relative(name);
  if (relative.is_absolute() || std::find(relative.begin(), relative.end(), "..") != relative.end())
    throw DamagedFile(text(manifest, " names ", name, ", which lies outside; it was not made by a build"));
  if (!fs::is_regular_file(path)) throw DamagedFile(text(path, " is missing; ", REBUILD));
  if (sha256_file(path) != sum->second)
    throw DamagedFile(text(path, " is cut off or changed since it was built; ", REBUILD));
}

Sidecar read_sidecar(const fs::path& plan) {
  fs::path path = plan.string() + ".json";  // where vitprune 0.1 had it
  if (!fs::is_regular_file(path)) path = fs::path(plan).replace_extension(".json");
  std::ifstream file(path);
  const Json plain = Json::parse(file, nullptr, /*allow_exceptions=*/false);
  if (!plain.is_object()) return {};
  const auto said = [&](const char* key) {
    const auto found = plain.find(key);
    return found != plain.end() && found->is_string() ? found->get<std::string>() : std::string("unknown");
  };
  std::vector<std::string> gpus;
  for (const auto& gpu : plain.value("compute_capabilities", Json::array())) gpus.push_back(option_text(gpu));
  Sidecar sidecar;
  sidecar.built_by =
      text("it was built by ", said("runtime"), " ", said("version"), " for compute capability ", joined(gpus));
  for (const auto& flag : plain.value("flags", Json::array()))
    sidecar.brings_code = sidecar.brings_code || flag == "VERSION_COMPATIBLE";
  return sidecar;
}

}  // namespace vitprune
