"use strict";

/* The dashboard. What it shows comes from the same API that everybody uses; every text from outside is set as text,
   never as markup. A value of null is "no data", which is not the same as zero. */

const POLL_MS = 2000;
const POLL_HIDDEN_MS = 30000;
const PING_MS = 20000;
const RETRY_MAX_MS = 15000;
const KEY_ITEM = "asapd.key";
const SESSION_ITEM = "asapd.session";
const NO_DATA = "no data";
const MAX_RESOLVED = 8;

const byId = (id) => document.getElementById(id);

// --- the key: in this tab only

const keyring = {
  value: null,
  /** Whether it was an address of `asapctl dashboard` that led here, and did not open any more. */
  cameTooLate: false,
  load() {
    // The address may carry a key behind the #, which browsers do not send; it does not stay in the address. After a
    // login there is the word that a session is open: its cookie is not ours to see.
    const given = new URLSearchParams(location.hash.slice(1));
    if (given.has("key") || given.has("session")) {
      history.replaceState(null, "", location.pathname + location.search);
      this.markSession(given.has("session"));
      this.set(given.get("key"));
      return;
    }
    if (given.has("login-gone")) {
      history.replaceState(null, "", location.pathname + location.search);
      this.cameTooLate = true;
    }
    try {
      this.value = sessionStorage.getItem(KEY_ITEM);
    } catch {
      this.value = null;
    }
  },
  get hasSession() {
    try {
      return sessionStorage.getItem(SESSION_ITEM) !== null;
    } catch {
      return false;
    }
  },
  markSession(isOpen) {
    try {
      if (isOpen) sessionStorage.setItem(SESSION_ITEM, "open");
      else sessionStorage.removeItem(SESSION_ITEM);
    } catch {
      /* Storage is switched off: the page works, but cannot offer to log out. */
    }
  },
  /** What to say of a caller that is not known; what is known no more is forgotten. */
  refused() {
    const hint =
      this.value !== null
        ? "This key is not known here, or it was revoked."
        : this.hasSession
          ? "The session is over."
          : this.cameTooLate
            ? "That address was used before, or is older than five minutes."
            : null;
    this.markSession(false);
    this.set(null);
    return hint;
  },
  set(value) {
    this.value = value;
    try {
      if (value === null) sessionStorage.removeItem(KEY_ITEM);
      else sessionStorage.setItem(KEY_ITEM, value);
    } catch {
      /* Storage is switched off: the key lasts until the page is reloaded. */
    }
  },
};

// --- asking the daemon

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

class Unreachable extends Error {}

async function ask(path) {
  const headers = keyring.value === null ? {} : { Authorization: `Bearer ${keyring.value}` };
  let response;
  try {
    response = await fetch(path, { headers, cache: "no-store", signal: AbortSignal.timeout(30000) });
  } catch {
    throw new Unreachable("asapd does not answer. Is it running? This page goes on trying.");
  }
  if (response.ok) return response.json();
  let detail = `asapd answered ${response.status}.`;
  try {
    const problem = await response.json();
    if (typeof problem.detail === "string" && problem.detail) detail = problem.detail;
  } catch {
    /* Not a problem document: the status has to do. */
  }
  throw new Refused(response.status, detail);
}

// --- words

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", minimumFractionDigits: 1, maximumFractionDigits: 1 });

const isMissing = (value) => value === null || value === undefined;
const count = (value) => (isMissing(value) ? NO_DATA : whole.format(value));
const tokens = (value) => {
  if (isMissing(value)) return NO_DATA;
  return value < 10000000 ? whole.format(value) : short.format(value);
};
const percent = (value) => {
  if (isMissing(value)) return NO_DATA;
  // Never rounded up to a full 100 %, nor down to none.
  const digits = value > 99 && value < 100 ? 3 : 2;
  const shown = Number(value.toFixed(digits));
  if (shown === 100 && value < 100) return ">99.999%";
  if (shown === 0 && value > 0) return "<0.01%";
  return `${shown}%`;
};
const milliseconds = (value) => {
  if (isMissing(value)) return NO_DATA;
  return value < 10000 ? `${whole.format(value)} ms` : `${(value / 1000).toFixed(1)} s`;
};
const usd = (value) => {
  if (isMissing(value)) return NO_DATA;
  if (value === 0) return "$0.00";
  const digits = Math.abs(value) < 0.01 ? 6 : Math.abs(value) < 0.1 ? 4 : 2;
  return `$${value.toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: digits })}`;
};
const duration = (seconds) => {
  if (isMissing(seconds)) return NO_DATA;
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  return `${Math.floor(seconds / 86400)} d ${Math.floor((seconds % 86400) / 3600)} h`;
};
const clock = (text) => new Date(text).toLocaleTimeString();
const moment = (text) => {
  const time = new Date(text);
  return time.toDateString() === new Date().toDateString() ? time.toLocaleTimeString() : time.toLocaleString();
};
const agentName = (urn) => (isMissing(urn) ? "" : urn.replace(/^urn:asap:agent:/, ""));
const TERMS = { availability: "Availability", latency: "p95 latency", error_rate: "Error rate" };
const termName = (type) => TERMS[type] || type.replaceAll("_", " ");

// --- making elements

function el(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (!isMissing(value)) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => !isMissing(child)));
  return element;
}

const pill = (state, text) => el("span", { class: "pill", "data-state": state }, text || state);
const empty = (...children) => el("p", { class: "empty" }, ...children);
const code = (text) => el("code", {}, text);

/* A cell: the figure, and below it what was promised or what belongs to it. */
function cell(label, text, { below, broken = false, number = false } = {}) {
  const kind = [number ? "number" : "", broken ? "broken" : "", text === NO_DATA ? "none" : ""].join(" ").trim();
  const value = text instanceof Node ? text : el("span", { class: kind || null }, text);
  return el(
    "td",
    { role: "cell", "data-label": label, class: number ? "number" : null },
    value,
    below ? el("small", {}, below) : null,
  );
}

function table(caption, columns, rows) {
  const heads = columns.map(([name, number]) =>
    el("th", { scope: "col", role: "columnheader", class: number ? "number" : null }, name),
  );
  // Roles are written out because the narrow layout takes the table's display away, and with it its meaning.
  return el(
    "table",
    { class: "stack", role: "table", "aria-label": caption },
    el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...heads)),
    el("tbody", { role: "rowgroup" }, ...rows),
  );
}

const row = (head, below, ...cells) =>
  el(
    "tr",
    { role: "row" },
    el("th", { scope: "row", role: "rowheader" }, head, below ? el("small", {}, below) : null),
    ...cells,
  );

const drawn = new Map();

/* Draw a region again only when what it shows has changed: a live region that is redrawn is read out again. */
function draw(id, shown, build) {
  const text = JSON.stringify(shown);
  if (drawn.get(id) === text) return;
  drawn.set(id, text);
  byId(id).replaceChildren(...[build(shown)].flat());
}

// --- the parts of the page

function drawBreaches() {
  const open = [...breaches.values()].filter((breach) => breach.state === "open");
  open.sort((a, b) => b.seq - a.seq);
  draw("open-breaches", open, (list) => {
    if (!list.length) return el("p", { class: "calm" }, "No breach is open.");
    return list.map((breach) =>
      el(
        "div",
        { class: "breach", "data-severity": breach.severity },
        el(
          "p",
          { class: "what" },
          pill(breach.severity),
          el("strong", {}, `${agentName(breach.agent_id) || breach.budget || breach.id}: ${termName(breach.breach_type)}`),
        ),
        el(
          "p",
          { class: "what quiet" },
          `since ${moment(breach.detected_at)}, over ${breach.window}, ${count(breach.samples)} samples`,
        ),
        el(
          "p",
          { class: "figures" },
          el("b", { class: isMissing(breach.actual) ? "none" : null }, isMissing(breach.actual) ? NO_DATA : breach.actual),
          `promised ${breach.threshold}`,
        ),
      ),
    );
  });
  document.title = open.length ? `(${open.length}) asapd` : "asapd";

  const resolved = [...breaches.values()].filter((breach) => breach.state === "resolved");
  resolved.sort((a, b) => Date.parse(b.resolved_at) - Date.parse(a.resolved_at));
  draw("history", resolved.slice(0, MAX_RESOLVED), (list) => {
    if (!list.length) return empty("None so far.");
    return table(
      "Resolved breaches",
      [["Breach"], ["Resolved"], ["Lasted", true]],
      list.map((breach) =>
        row(
          agentName(breach.agent_id) || breach.id,
          `${termName(breach.breach_type)}: ${isMissing(breach.actual) ? NO_DATA : breach.actual}, promised ${breach.threshold}`,
          cell("Resolved", moment(breach.resolved_at), { below: (breach.resolve_reason || "").replaceAll("_", " ") }),
          cell("Lasted", duration(breach.duration_seconds), { number: true }),
        ),
      ),
    );
  });
}

function drawAgents(agents) {
  const shown = agents.data.map((agent) => {
    const broken = [...breaches.values()]
      .filter((breach) => breach.state === "open" && breach.agent_id === agent.id)
      .map((breach) => breach.breach_type);
    return {
      id: agent.id,
      state: agent.state,
      why: agent.not_probed
        ? `not probed: ${agent.not_probed.detail}`
        : agent.last_probe && !agent.last_probe.up ? agent.last_probe.detail || agent.last_probe.reason : null,
      uptime: percent(agent.uptime_percent),
      p95: milliseconds(agent.latency_p95_ms),
      errors: percent(agent.error_rate_percent),
      score: isMissing(agent.sla_score) ? NO_DATA : String(Math.floor(agent.sla_score)),
      sla: agent.sla,
      slaError: agent.sla_error,
      broken,
    };
  });
  draw("agents", shown, (list) => {
    if (!list.length) {
      return empty(
        "No agents yet. Add one with ",
        code("asapctl agents add"),
        ", or name it under ",
        code("[[agents]]"),
        " in the configuration: asapd then probes it and holds it to its promise.",
      );
    }
    const promised = (value, text) => (isMissing(value) ? "nothing promised" : text);
    return table(
      "Agents",
      [["Agent"], ["State"], ["Uptime", true], ["p95 latency", true], ["Error rate", true], ["Score", true]],
      list.map((agent) => {
        const sla = agent.sla || {};
        return row(
          agentName(agent.id),
          agent.slaError || null,
          cell("State", pill(agent.state), { below: agent.why }),
          cell("Uptime", agent.uptime, {
            below: promised(sla.availability, `promised ≥ ${sla.availability}`),
            broken: agent.broken.includes("availability"),
            number: true,
          }),
          cell("p95 latency", agent.p95, {
            below: promised(sla.max_latency_p95_ms, `promised ≤ ${milliseconds(sla.max_latency_p95_ms)}`),
            broken: agent.broken.includes("latency"),
            number: true,
          }),
          cell("Error rate", agent.errors, {
            below: promised(sla.max_error_rate, `promised ≤ ${sla.max_error_rate}`),
            broken: agent.broken.includes("error_rate"),
            number: true,
          }),
          cell("Score", agent.score, { below: agent.score === NO_DATA ? null : "of 100", number: true }),
        );
      }),
    );
  });
}

function drawTiles(summary, agents) {
  const states = agents.data.map((agent) => agent.state);
  const up = states.filter((state) => state === "healthy" || state === "degraded").length;
  const idle = summary.total_events === 0;
  const tiles = [
    ["Agents up", states.length ? `${up} of ${states.length}${agents.next_cursor ? "+" : ""}` : "none yet"],
    ["Tasks", count(summary.total_tasks)],
    ["Tokens", tokens(summary.total_tokens)],
    ["Cost", idle ? "$0.00" : usd(summary.total_cost_usd)],
  ];
  draw("tiles", tiles, (list) =>
    list.map(([name, value]) =>
      el("div", {}, el("dt", {}, name), el("dd", { class: value === NO_DATA ? "none" : null }, value)),
    ),
  );
}

function drawUsage(usage) {
  const rows = [...usage.data].sort(
    (a, b) => (b.total_cost_usd || 0) - (a.total_cost_usd || 0) || b.total_tokens - a.total_tokens,
  );
  draw("usage", rows, (list) => {
    if (!list.length) {
      return empty("Nothing was reported today. Agents report what they use with ", code("POST /usage"), ".");
    }
    return table(
      "Usage and cost today by agent",
      [["Agent"], ["Tasks", true], ["Tokens", true], ["Cost", true]],
      list.map((one) =>
        row(
          agentName(one.agent_id),
          null,
          cell("Tasks", count(one.total_tasks), { number: true }),
          cell("Tokens", tokens(one.total_tokens), { number: true }),
          cell("Cost", usd(one.total_cost_usd), {
            below: one.unpriced_events && one.total_cost_usd !== null ? `${count(one.unpriced_events)} of unknown cost` : null,
            number: true,
          }),
        ),
      ),
    );
  });
}

function budget(delegation) {
  const limits = delegation.constraints;
  const left = delegation.remaining || {};
  if (!isMissing(limits.max_cost_usd)) {
    return { left: left.cost_usd, limit: limits.max_cost_usd, text: `${usd(left.cost_usd)} of ${usd(limits.max_cost_usd)} left` };
  }
  if (!isMissing(limits.max_tasks)) {
    return { left: left.tasks, limit: limits.max_tasks, text: `${count(left.tasks)} of ${count(limits.max_tasks)} tasks left` };
  }
  return null;
}

function meter(what, { left, limit, text }) {
  const share = limit > 0 && !isMissing(left) ? Math.max(0, Math.min(1, left / limit)) : 0;
  const level = share <= 0 ? "empty" : share < 0.2 ? "low" : "enough";
  const fill = el("div", {});
  fill.style.width = `${(share * 100).toFixed(1)}%`;
  return el(
    "div",
    {
      class: "meter",
      role: "meter",
      "aria-label": `Budget left of ${what}`,
      "aria-valuemin": 0,
      "aria-valuemax": limit,
      "aria-valuenow": isMissing(left) ? 0 : left,
      "aria-valuetext": text,
      "data-level": level,
    },
    fill,
  );
}

function drawDelegations(delegations) {
  const newest = [...delegations.data].sort((a, b) => Date.parse(b.registered_at) - Date.parse(a.registered_at));
  draw("delegations", [newest, delegations.next_cursor], ([list, more]) => {
    if (!list.length) {
      return empty(
        "No delegation is in force. Let an agent spend on another's behalf with ",
        code("asapctl delegation issue"),
        ".",
      );
    }
    const items = list.map((one) => {
      const what = `${agentName(one.delegator)} → ${agentName(one.delegate)}`;
      const limit = budget(one);
      const reserved = one.reserved_usd > 0 ? `, ${usd(one.reserved_usd)} reserved` : "";
      return el(
        "div",
        { class: "delegation" },
        el("p", { class: "names" }, el("strong", {}, what), el("span", { class: limit && limit.left <= 0 ? "broken" : null }, limit ? limit.text : "without a limit")),
        limit ? meter(what, limit) : null,
        el(
          "small",
          {},
          el("span", {}, `spent ${usd(one.spent_usd)}${reserved}, ${count(one.tasks_used)} tasks`),
          el("span", {}, `until ${moment(one.constraints.expires_at)}`),
        ),
      );
    });
    if (more) items.push(el("p", { class: "quiet" }, "There are more; ", code("asapctl delegation list"), " shows all."));
    return items;
  });
}

async function verifyAudit() {
  const button = byId("verify");
  button.disabled = true;
  byId("audit").replaceChildren(el("p", { class: "quiet" }, "Verifying…"));
  try {
    const found = await ask("/audit/verify");
    const lines = found.valid
      ? [
          el("p", {}, pill("valid", "intact"), ` ${count(found.verified)} entries verified at ${clock(new Date())}.`),
          el("p", {}, "Head: entry ", String(found.last_seq), ", ", code(found.last_hash)),
        ]
      : [
          el("p", {}, pill("invalid", "broken"), ` Entry ${found.first_bad.seq} (${found.first_bad.id || "missing"}) is the first that is wrong.`),
          el("p", {}, found.first_bad.reason),
        ];
    if (found.valid && found.note) lines.push(el("p", { class: "quiet" }, `Note: ${found.note}.`));
    byId("audit").replaceChildren(...lines);
  } catch (error) {
    byId("audit").replaceChildren(el("p", { class: "broken" }, error.message));
  } finally {
    button.disabled = false;
  }
}

// --- breaches: read once, then live

const breaches = new Map();
let lastSeq = 0;

function keep(breach) {
  const known = breaches.get(breach.id);
  if (!known || known.seq <= breach.seq) breaches.set(breach.id, breach);
  lastSeq = Math.max(lastSeq, breach.seq);
}

async function readBreaches() {
  const [open, recent] = await Promise.all([
    ask("/sla/breaches?state=open&limit=1000"),
    ask("/sla/breaches?state=resolved&limit=20"),
  ]);
  const stillOpen = new Set(open.data.map((breach) => breach.id));
  for (const [id, breach] of breaches) if (breach.state === "open" && !stillOpen.has(id)) breaches.delete(id);
  [...recent.data, ...open.data].forEach(keep);
}

const live = {
  socket: null,
  retry: null,
  retryMs: 500,
  pings: null,

  open() {
    this.close();
    const scheme = location.protocol === "https:" ? "wss:" : "ws:";
    const protocols = ["asapd.v1"];
    if (keyring.value !== null) protocols.push(`asapd.bearer.${keyring.value}`);
    let socket;
    try {
      socket = new WebSocket(`${scheme}//${location.host}/ws`, protocols);
    } catch {
      // The key holds characters that no key has.
      showConnection("offline", "not live");
      return;
    }
    this.socket = socket;
    let heard = Date.now();
    socket.onopen = () => {
      const params = { resume_after: lastSeq };
      socket.send(JSON.stringify({ jsonrpc: "2.0", id: "subscribe", method: "sla.subscribe", params }));
      this.pings = setInterval(() => {
        if (Date.now() - heard > 2 * PING_MS) socket.close();
        else socket.send(JSON.stringify({ jsonrpc: "2.0", id: "ping", method: "ping" }));
      }, PING_MS);
    };
    socket.onmessage = (event) => {
      heard = Date.now();
      this.hear(event.data);
    };
    socket.onclose = () => {
      if (this.socket !== socket) return;
      this.close();
      showConnection("retrying", "reconnecting");
      // Spread, so that many pages do not come back in the same moment.
      this.retry = setTimeout(() => this.open(), this.retryMs * (0.5 + Math.random()));
      this.retryMs = Math.min(this.retryMs * 2, RETRY_MAX_MS);
    };
  },

  close() {
    clearInterval(this.pings);
    clearTimeout(this.retry);
    const socket = this.socket;
    this.socket = null;
    if (socket) socket.close();
  },

  hear(text) {
    let message;
    try {
      message = JSON.parse(text);
    } catch {
      return;
    }
    if (message.id === "subscribe" && message.result) {
      this.retryMs = 500;
      // A log that was restored from a backup may be behind what this page has seen.
      lastSeq = Math.min(lastSeq, message.result.seq);
      showConnection("live", "live");
      refresh();
    } else if (message.id === "subscribe" && message.error) {
      showProblem(`Live alerts were refused: ${message.error.message}`);
    } else if (message.method === "sla.breach") {
      keep(message.params.breach);
      drawBreaches();
      refresh();
    } else if (message.method === "gap") {
      refresh();
    }
  },
};

// --- the page

function showConnection(state, text) {
  const shown = byId("connection");
  if (shown.dataset.state === state && shown.textContent === text) return;
  shown.dataset.state = state;
  shown.textContent = text;
}

function showProblem(text) {
  const shown = byId("problem");
  shown.hidden = !text;
  if (shown.textContent !== (text || "")) shown.textContent = text || "";
}

function askForKey(hint) {
  stop();
  byId("content").hidden = true;
  byId("controls").hidden = true;
  byId("forget").hidden = true;
  byId("key-form").hidden = false;
  showProblem(hint);
  showConnection("offline", "locked");
  byId("key").focus();
}

let running = false;
let timer = null;
let busy = false;
let again = false;

function stop() {
  running = false;
  clearTimeout(timer);
  live.close();
}

async function readAll() {
  const midnight = new Date();
  midnight.setUTCHours(0, 0, 0, 0);
  const today = `start=${encodeURIComponent(midnight.toISOString())}`;
  const windowName = byId("window").value;
  const [agents, summary, usage, delegations] = await Promise.all([
    ask(`/agents?limit=1000&window=${encodeURIComponent(windowName)}`),
    ask(`/usage/summary?${today}`),
    ask(`/usage/aggregate?group_by=agent&limit=1000&${today}`),
    ask("/delegations?state=active"),
    readBreaches(),
  ]);
  if (!running) return;
  drawBreaches();
  drawAgents(agents);
  drawTiles(summary, agents);
  drawUsage(usage);
  drawDelegations(delegations);
  byId("content").hidden = false;
  byId("controls").hidden = false;
  byId("updated").textContent = `Figures of ${new Date().toLocaleTimeString()}; breaches arrive at once.`;
}

/* Read everything again: now, or right after the reading that is under way. */
async function refresh() {
  if (!running) return;
  if (busy) {
    again = true;
    return;
  }
  busy = true;
  clearTimeout(timer);
  try {
    await readAll();
    if (running) showProblem(null);
  } catch (error) {
    if (!running) {
      // Logged out meanwhile: what was under way is of no interest any more.
    } else if (error instanceof Refused && error.status === 401) {
      askForKey(keyring.refused());
    } else if (error instanceof Unreachable) {
      showProblem(error.message);
      showConnection("offline", "no answer");
    } else {
      showProblem(error.message);
    }
  } finally {
    busy = false;
    if (running) {
      timer = setTimeout(refresh, again ? 0 : document.hidden ? POLL_HIDDEN_MS : POLL_MS);
      again = false;
    }
  }
}

async function start() {
  try {
    await ask("/usage/summary");
  } catch (error) {
    if (error instanceof Refused && error.status === 401) {
      askForKey(keyring.refused());
      return;
    }
    showProblem(error.message);
    if (!(error instanceof Refused)) {
      showConnection("offline", "no answer");
      setTimeout(start, POLL_MS);
      return;
    }
  }
  byId("key-form").hidden = true;
  byId("forget").hidden = keyring.value === null && !keyring.hasSession;
  byId("forget").textContent = keyring.value === null ? "Log out" : "Forget key";
  running = true;
  await refresh();
  if (running) live.open();
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const value = byId("key").value.trim();
  byId("key").value = "";
  if (!value) return;
  keyring.set(value);
  showProblem(null);
  showConnection("connecting", "connecting");
  start();
});
byId("forget").addEventListener("click", async () => {
  if (keyring.value !== null) {
    keyring.set(null);
    askForKey("The key was forgotten.");
    return;
  }
  try {
    await fetch("/login", { method: "DELETE" });
    keyring.markSession(false);
    askForKey("Logged out.");
  } catch {
    showProblem("asapd does not answer: the session is still open.");
  }
});
byId("verify").addEventListener("click", verifyAudit);
byId("window").addEventListener("change", refresh);
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) refresh();
});

keyring.load();
start();
ask("/healthz").then(
  (found) => {
    byId("version").textContent = found.version || "";
  },
  () => {},
);
