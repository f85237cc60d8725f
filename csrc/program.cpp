#include "program.h"

#include <algorithm>
#include <atomic>

#include "scratch.h"

namespace moejet {
namespace {

// A row-wise operation on fewer values than this runs on one worker: a barrier would cost as much.
constexpr int64_t kSerialValues = 16 * 1024;
constexpr int64_t kRowsPerTask = 4;
// Router scores: tokens of one task when there are many, experts of one task when there are few.
constexpr int64_t kRouterTokens = 32;
constexpr int64_t kRouterExperts = 16;

// The same function of every row.
class RowOperation : public Operation {
 public:
  explicit RowOperation(int64_t values_per_row) : values_per_row_(values_per_row) {}

  void begin(const Step& step) override {
    step_ = &step;
    num_rows_ = count(step);
    started_ = false;
  }
  bool next() override {
    if (started_) return false;
    started_ = true;
    next_row_.store(0, std::memory_order_relaxed);
    if (num_rows_ * values_per_row_ > kSerialValues && num_rows_ > 1) return true;
    for (int64_t r = 0; r < num_rows_; ++r) row(r);
    return false;
  }
  void work(int) override {
    for (int64_t r;
         (r = next_row_.fetch_add(kRowsPerTask, std::memory_order_relaxed)) < num_rows_;) {
      for (int64_t i = r; i < std::min(r + kRowsPerTask, num_rows_); ++i) row(i);
    }
  }

 protected:
  virtual int64_t count(const Step& step) const { return step.num_tokens; }
  virtual void row(int64_t r) = 0;
  const Step* step_ = nullptr;

 private:
  const int64_t values_per_row_;
  int64_t num_rows_ = 0;
  bool started_ = false;
  std::atomic<int64_t> next_row_{0};
};

class Embed final : public RowOperation {
 public:
  const char* name() const override { return "embed"; }
  Embed(const OpKernels& ops, const EmbedTable& table, Rows out)
      : RowOperation(table.hidden_size), ops_(ops), table_(table), out_(out) {}
  void row(int64_t t) override { ops_.embed_row(table_, step_->token_ids[t], out_.row(t)); }

 private:
  const OpKernels& ops_;
  const EmbedTable table_;
  const Rows out_;
};

class Norm final : public RowOperation {
 public:
  const char* name() const override { return "rms_norm"; }
  Norm(const OpKernels& ops, Rows h, std::vector<Rows> deltas, const RmsNorm& norm, Rows out,
       bool only_logits_rows)
      : RowOperation(norm.dim),
        ops_(ops),
        h_(h),
        deltas_(std::move(deltas)),
        norm_(norm),
        out_(out),
        only_logits_rows_(only_logits_rows) {}
  int64_t count(const Step& step) const override {
    return only_logits_rows_ ? step.num_logits : step.num_tokens;
  }
  void row(int64_t r) override {
    const int64_t t = only_logits_rows_ ? step_->logits_indices[r] : r;
    if (deltas_.empty()) {
      ops_.rms_norm_row(norm_, h_.row(t), out_.row(r));
      return;
    }
    const float* second = deltas_.size() > 1 ? deltas_[1].row(t) : nullptr;
    ops_.add_rms_norm_row(norm_, deltas_[0].row(t), second, h_.row(t), out_.row(r));
  }

 private:
  const OpKernels& ops_;
  const Rows h_;
  const std::vector<Rows> deltas_;
  const RmsNorm norm_;
  const Rows out_;
  const bool only_logits_rows_;
};

class Bias final : public RowOperation {
 public:
  const char* name() const override { return "bias"; }
  Bias(const OpKernels& ops, const float* bias, Rows out)
      : RowOperation(out.cols), ops_(ops), bias_(bias), out_(out) {}
  void row(int64_t t) override { ops_.add_row(out_.cols, bias_, nullptr, out_.row(t)); }

 private:
  const OpKernels& ops_;
  const float* const bias_;
  const Rows out_;
};

class RopeAndStore final : public RowOperation {
 public:
  const char* name() const override { return "rope_and_store"; }
  RopeAndStore(const OpKernels& ops, const Program::Latent& latent)
      : RowOperation(latent.heads * latent.rope_dim + latent.rank),
        ops_(ops),
        l_(latent),
        row_bytes_(
            latent_layout(latent.rank, latent.rope_dim, dtype_bytes(latent.cache_dtype)).bytes) {}
  void row(int64_t t) override {
    const float* cos_sin = l_.cos_sin + step_->positions[t] * l_.rope_dim;
    float* q_pe = l_.q.row(t) + l_.head_dim - l_.rope_dim;
    ops_.rope_row(
        {cos_sin, l_.rope_dim, l_.interleave, l_.heads, q_pe, l_.head_dim, q_pe, l_.head_dim});
    const float* latent = l_.latent.row(t);
    void* out = static_cast<uint8_t*>(l_.cache) + step_->slot_mapping[t] * row_bytes_;
    ops_.store_latent_row({latent, latent + l_.rank, l_.rank, l_.rope_dim, l_.norm_weight,
                           l_.norm_eps, cos_sin, l_.interleave, out, l_.cache_dtype});
  }

 private:
  const OpKernels& ops_;
  const Program::Latent l_;
  const int64_t row_bytes_;
};

// Tasks that share their phases.
class SideBySide : public Operation {
 public:
  bool next() override {
    bool any = false;
    for (size_t i = 0; i < tasks_.size(); ++i) any |= active_[i] = active_[i] && tasks_[i]->next();
    return any;
  }
  void work(int worker) override {
    for (size_t i = 0; i < tasks_.size(); ++i) {
      if (active_[i]) tasks_[i]->work(worker);
    }
  }

 protected:
  void add(std::unique_ptr<Task> task) {
    tasks_.push_back(std::move(task));
    active_.push_back(false);
  }
  void start() { std::fill(active_.begin(), active_.end(), true); }

 private:
  std::vector<std::unique_ptr<Task>> tasks_;
  std::vector<bool> active_;
};

LinearCall linear_call(const LinearWeights& weights, int64_t num_tokens, Rows x, Rows out) {
  return {num_tokens, x.data,      DType::kF32, x.stride,      0,
          out.data,   DType::kF32, out.stride,  weights.rows()};
}

class Projections final : public SideBySide {
 public:
  const char* name() const override { return "linear"; }
  Projections(std::vector<Program::Projection> projections,
              std::vector<std::unique_ptr<LinearTask>> tasks)
      : projections_(std::move(projections)) {
    for (std::unique_ptr<LinearTask>& task : tasks) {
      linear_.push_back(task.get());
      add(std::move(task));
    }
  }
  void begin(const Step& step) override {
    start();
    for (size_t i = 0; i < linear_.size(); ++i) {
      const Program::Projection& p = projections_[i];
      linear_[i]->begin(linear_call(*p.weights, step.num_tokens, p.x, p.out));
    }
  }

 private:
  const std::vector<Program::Projection> projections_;
  std::vector<LinearTask*> linear_;
};

class LmHead final : public Operation {
 public:
  const char* name() const override { return "lm_head"; }
  LmHead(const LinearWeights& weights, std::unique_ptr<LinearTask> task, Rows x,
         float* const* logits)
      : weights_(weights), task_(std::move(task)), x_(x), logits_(logits) {}
  void begin(const Step& step) override {
    const Rows out{*logits_, weights_.rows(), weights_.rows()};
    task_->begin(linear_call(weights_, step.num_logits, x_, out));
  }
  bool next() override { return task_->next(); }
  void work(int worker) override { task_->work(worker); }

 private:
  const LinearWeights& weights_;
  const std::unique_ptr<LinearTask> task_;
  const Rows x_;
  float* const* const logits_;
};

class ExpertGroups final : public SideBySide {
 public:
  const char* name() const override { return "experts"; }
  ExpertGroups(std::vector<Program::Experts> groups, std::vector<std::unique_ptr<MoeTask>> tasks)
      : groups_(std::move(groups)) {
    for (std::unique_ptr<MoeTask>& task : tasks) {
      moe_.push_back(task.get());
      add(std::move(task));
    }
  }
  void begin(const Step& step) override {
    start();
    for (size_t i = 0; i < moe_.size(); ++i) {
      const Program::Experts& e = groups_[i];
      moe_[i]->begin({step.num_tokens, e.top_k, e.x.data, DType::kF32, e.x.stride, e.topk_ids,
                      e.topk_weights, e.out.data, DType::kF32, e.out.stride});
    }
  }

 private:
  const std::vector<Program::Experts> groups_;
  std::vector<MoeTask*> moe_;
};

class Router final : public Operation {
 public:
  const char* name() const override { return "router"; }
  Router(const OpKernels& ops, const RouterMatrix& matrix, const RouterChoice& choice, int32_t* ids,
         float* weights)
      : ops_(ops), matrix_(matrix), choice_(choice), ids_(ids), weights_(weights) {}

  void begin(const Step& step) override {
    num_tokens_ = step.num_tokens;
    phase_ = 0;
    // Few tokens stream the matrix in slices of experts; many reuse it from cache.
    tokens_per_task_ = num_tokens_ < kRouterTokens ? num_tokens_ : kRouterTokens;
    experts_per_task_ = num_tokens_ < kRouterTokens ? kRouterExperts : choice_.num_experts;
    expert_tasks_ = ceil_div(choice_.num_experts, experts_per_task_);
    num_tasks_ = expert_tasks_ * ceil_div(num_tokens_, tokens_per_task_);
  }
  bool next() override {
    next_item_.store(0, std::memory_order_relaxed);
    if (phase_++ == 0) return true;
    if (phase_ == 2) {
      if (num_tokens_ * choice_.num_experts > kSerialValues) return true;
      for (int64_t t = 0; t < num_tokens_; ++t) choose(t);
    }
    return false;
  }
  void work(int) override {
    if (phase_ == 2) {
      for (int64_t t; (t = next_item_.fetch_add(1, std::memory_order_relaxed)) < num_tokens_;) {
        choose(t);
      }
      return;
    }
    for (int64_t i; (i = next_item_.fetch_add(1, std::memory_order_relaxed)) < num_tasks_;) {
      const int64_t token = i / expert_tasks_ * tokens_per_task_;
      const int64_t expert = i % expert_tasks_ * experts_per_task_;
      ops_.router_logits(matrix_, token, std::min(token + tokens_per_task_, num_tokens_), expert,
                         std::min(expert + experts_per_task_, choice_.num_experts));
    }
  }

 private:
  void choose(int64_t t) {
    ops_.router_topk_row(choice_, matrix_.logits + t * matrix_.logits_stride,
                         ids_ + t * choice_.top_k, weights_ + t * choice_.top_k);
  }

  const OpKernels& ops_;
  const RouterMatrix matrix_;
  const RouterChoice choice_;
  int32_t* const ids_;
  float* const weights_;
  int64_t num_tokens_ = 0, tokens_per_task_ = 1, experts_per_task_ = 1;
  int64_t expert_tasks_ = 0, num_tasks_ = 0;
  int phase_ = 0;
  std::atomic<int64_t> next_item_{0};
};

class Attention final : public Operation {
 public:
  const char* name() const override { return "attention"; }
  Attention(std::unique_ptr<AttentionTask> task, const AttentionCall& bound)
      : task_(std::move(task)), call_(bound) {}
  void begin(const Step& step) override {
    call_.num_requests = step.num_requests;
    call_.query_lens = step.query_lens;
    call_.context_lens = step.context_lens;
    call_.block_tables = step.block_tables;
    call_.table_width = step.table_width;
    task_->begin(call_);
  }
  bool next() override { return task_->next(); }
  void work(int worker) override { task_->work(worker); }

 private:
  const std::unique_ptr<AttentionTask> task_;
  AttentionCall call_;
};

}  // namespace

Program::Program(ThreadPool* pool, const KernelTable& table)
    : pool_(pool), table_(table), attention_scratch_(pool->num_threads()) {}

Workspace* Program::workspace(size_t lane) {
  while (workspaces_.size() <= lane) workspaces_.push_back(std::make_unique<Workspace>());
  return workspaces_[lane].get();
}

void Program::embed(const EmbedTable& table, Rows out) {
  add(std::make_unique<Embed>(table_.ops, table, out));
}

void Program::rms_norm(Rows h, std::vector<Rows> deltas, const RmsNorm& norm, Rows out,
                       bool only_logits_rows) {
  add(std::make_unique<Norm>(table_.ops, h, std::move(deltas), norm, out, only_logits_rows));
}

void Program::linear(std::vector<Projection> projections) {
  std::vector<std::unique_ptr<LinearTask>> tasks;
  std::vector<std::unique_ptr<Operation>> biases;
  for (const Projection& p : projections) {
    tasks.push_back(std::make_unique<LinearTask>(*p.weights, table_, workspace(tasks.size()),
                                                 pool_->num_threads()));
    if (p.bias != nullptr) biases.push_back(std::make_unique<Bias>(table_.ops, p.bias, p.out));
  }
  add(std::make_unique<Projections>(std::move(projections), std::move(tasks)));
  for (std::unique_ptr<Operation>& bias : biases) add(std::move(bias));
}

void Program::rope_and_store(const Latent& latent) {
  add(std::make_unique<RopeAndStore>(table_.ops, latent));
}

void Program::attention(const AttentionWeights& weights, const AttentionCall& bound) {
  auto task = std::make_unique<AttentionTask>(weights, table_, workspace(0), &attention_scratch_,
                                              pool_->num_threads());
  add(std::make_unique<Attention>(std::move(task), bound));
}

void Program::router(const RouterMatrix& matrix, const RouterChoice& choice, int32_t* topk_ids,
                     float* topk_weights) {
  add(std::make_unique<Router>(table_.ops, matrix, choice, topk_ids, topk_weights));
}

void Program::experts(std::vector<Experts> groups) {
  std::vector<std::unique_ptr<MoeTask>> tasks;
  for (const Experts& group : groups) {
    tasks.push_back(std::make_unique<MoeTask>(*group.weights, table_, workspace(tasks.size()),
                                              pool_->num_threads()));
    expert_tasks_.push_back(tasks.back().get());
  }
  add(std::make_unique<ExpertGroups>(std::move(groups), std::move(tasks)));
}

void Program::lm_head(const LinearWeights& weights, Rows x) {
  auto task = std::make_unique<LinearTask>(weights, table_, workspace(0), pool_->num_threads());
  add(std::make_unique<LmHead>(weights, std::move(task), x, &logits_));
}

bool Program::next() {
  for (; position_ < operations_.size(); ++position_) {
    Timed& timed = operations_[position_];
    current_ = timed.operation.get();
    if (!begun_) current_->begin(step_);
    begun_ = true;
    if (current_->next()) return true;
    begun_ = false;
    const auto now = std::chrono::steady_clock::now();
    timed.spent += now - last_change_;
    last_change_ = now;
  }
  return false;
}

std::vector<std::pair<const char*, double>> Program::operation_seconds() const {
  std::vector<std::pair<const char*, double>> result;
  for (const Timed& timed : operations_) {
    result.emplace_back(timed.operation->name(),
                        std::chrono::duration<double>(timed.spent).count());
  }
  return result;
}

std::vector<std::pair<int64_t, int64_t>> Program::expert_loads() const {
  std::vector<std::pair<int64_t, int64_t>> result;
  for (const MoeTask* task : expert_tasks_) {
    result.emplace_back(task->expert_loads(), task->bytes_read());
  }
  return result;
}

void Program::run(const Step& step, float* logits) {
  ThreadPool::Lease lease = pool_->acquire();
  step_ = step;
  logits_ = logits;
  position_ = 0;
  begun_ = false;
  last_change_ = std::chrono::steady_clock::now();
  lease.run(this);
}

}  // namespace moejet
