// Search the transcripts of the page and play the recordings. All names and texts are added as text, never as HTML.

const TEXTS = {
  en: {
    title: "Transcripts",
    search: "Search",
    names: "Recording",
    whole: "Whole words",
    accents: "Ignore accents (a also finds å, ä)",
    keys: "Keys: / to search, arrows to move between matches, Enter to play, Escape to clear.",
    recordings: (shown, all) => (shown === all ? `${all} recordings` : `${shown} of ${all} recordings`),
    matches: (n, shown) => `${n} ${n === "1" ? "match" : "matches"} in ${shown}`,
    short: "Type at least two letters.",
    moreHits: n => `${n} more in this recording`,
    more: n => `Show ${n} more recordings`,
    whole_text: "Whole transcript",
    play: "Play",
    absent: "The recording was not kept.",
    no_transcript: "There is no transcript.",
    no_words: "No words were recognised.",
    failed: "The recording cannot be played: it is no longer at its place, or this browser cannot play its format.",
    unsure: "Words with a dotted line are probably wrong.",
    confidence: percent => `Confidence about ${percent}%`
  },
  sv: {
    title: "Transkriptioner",
    search: "Sök",
    names: "Inspelning",
    whole: "Hela ord",
    accents: "Bortse från accenter (a hittar även å, ä)",
    keys: "Tangenter: / för att söka, pilar mellan träffar, Enter för att spela upp, Escape för att rensa.",
    recordings: (shown, all) => (shown === all ? `${all} inspelningar` : `${shown} av ${all} inspelningar`),
    matches: (n, shown) => `${n} ${n === "1" ? "träff" : "träffar"} i ${shown}`,
    short: "Skriv minst två bokstäver.",
    moreHits: n => `${n} till i den här inspelningen`,
    more: n => `Visa ${n} inspelningar till`,
    whole_text: "Hela transkriptionen",
    play: "Spela upp",
    absent: "Inspelningen finns inte kvar.",
    no_transcript: "Det finns ingen transkription.",
    no_words: "Inga ord uppfattades.",
    failed: "Inspelningen kan inte spelas upp: den finns inte kvar på sin plats, eller så saknar webbläsaren formatet.",
    unsure: "Ord med prickad linje är troligen fel.",
    confidence: percent => `Säkerhet omkring ${percent} %`
  }
}
const PAGE_SIZE = 30 // recordings
const FIRST_HITS = 3 // of a recording
const SNIPPET_CHARS = 90 // before and after a match
const LEAD_S = 0.2 // start of playback before the word: times are right to a few tenths of a second
const UNSURE = 5 // confidences below 0.5

const find = id => document.getElementById(id)
const locale = (navigator.language || "en").toLowerCase().startsWith("sv") ? "sv" : "en"
const texts = TEXTS[locale]
const number = new Intl.NumberFormat(locale)
const data = JSON.parse(find("data").textContent)
find("data").textContent = ""
const recordings = data.recordings.map(createRecording)
const audio = find("audio")
let results = [] // {recording, hits}: hits are [start, end] in the recording's text
let shown = 0 // number of results on the page
let current = null // {recording, line} of the player

function createRecording(fields, index) {
  const starts = [] // position of each line in the text
  let length = 0
  for (const line of fields.lines) {
    starts.push(length)
    length += line[1].length + 1
  }
  return { ...fields, index, starts, text: fields.lines.map(line => line[1]).join(" "), folded: [] }
}

// --- search ----------------------------------------------------------------------------------------------------------

// Return the text in small letters, each at its position; without accents if `plain`.
function fold(text, plain) {
  let folded = text.toLowerCase()
  if (folded.length !== text.length) {
    folded = Array.from({ length: text.length }, (_, i) => text[i].toLowerCase())
      .map((letter, i) => (letter.length === 1 ? letter : text[i]))
      .join("")
  }
  return plain ? folded.replace(/[\u00c0-\u1fff]/g, letter => letter.normalize("NFD")[0]) : folded
}

// Return the pattern of a query: its words one after another, with any punctuation between them.
function patternOf(query, whole) {
  const literal = word => word.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&")
  const words = query.match(/[\p{L}\p{M}\p{N}]+/gu)
  const body = words ? words.map(literal).join("[^\\p{L}\\p{N}]+") : literal(query)
  return new RegExp(whole && words ? `(?<![\\p{L}\\p{N}])${body}(?![\\p{L}\\p{N}])` : body, "gu")
}

function hitsOf(recording, pattern, plain) {
  recording.folded[plain ? 1 : 0] ??= fold(recording.text, plain)
  const hits = []
  for (const match of recording.folded[plain ? 1 : 0].matchAll(pattern)) {
    hits.push([match.index, match.index + match[0].length])
  }
  return hits
}

function search() {
  const plain = find("accents").checked
  const query = fold(find("query").value.normalize("NFC").trim(), plain)
  const part = fold(find("names").value.normalize("NFC").trim(), plain)
  const chosen = recordings.filter(recording => fold(recording.name, plain).includes(part))
  const isSearch = query.length > 1
  if (isSearch) {
    const pattern = patternOf(query, find("whole").checked)
    const found = chosen.map(recording => ({ recording, hits: hitsOf(recording, pattern, plain) }))
    results = found.filter(result => result.hits.length)
  } else {
    results = chosen.map(recording => ({ recording, hits: [] }))
  }
  const n = results.reduce((sum, result) => sum + result.hits.length, 0)
  const count = texts.recordings(number.format(results.length), number.format(recordings.length))
  const hint = query.length === 1 ? ` ${texts.short}` : ""
  find("status").textContent = isSearch ? `${texts.matches(number.format(n), count)}.` : `${count}.${hint}`
  find("results").replaceChildren()
  shown = 0
  showMore()
}

// --- results ---------------------------------------------------------------------------------------------------------

function create(tag, className, ...children) {
  const element = document.createElement(tag)
  element.className = className
  element.append(...children)
  if (tag === "button") element.type = "button"
  return element
}

function showMore() {
  const next = results.slice(shown, shown + PAGE_SIZE)
  find("results").append(...next.map(createCard))
  shown += next.length
  const left = results.length - shown
  find("more").hidden = !left
  find("more").textContent = texts.more(number.format(Math.min(left, PAGE_SIZE)))
}

function createCard({ recording, hits }) {
  const length = recording.lines.length ? clock(recording.lines.at(-1)[0]) : ""
  const card = create("article", "card", create("header", "", create("h2", "", recording.name)))
  if (length && !hits.length) card.firstChild.append(create("span", "soft", length))
  const problem = recording.problem ?? (recording.lines.length ? "" : "no_words")
  const notes = [texts[problem] ?? problem, recording.audio ? "" : texts.absent].filter(Boolean)
  if (notes.length) card.append(create("p", "problem", notes.join(" · ")))
  if (hits.length) card.append(createHits(recording, hits))
  if (recording.lines.length) card.append(createTranscript(recording))
  return card
}

function createHits(recording, hits) {
  const list = create("ol", "")
  const add = some => list.append(...some.map(hit => create("li", "", createHit(recording, hit))))
  add(hits.slice(0, FIRST_HITS))
  if (hits.length <= FIRST_HITS) return list
  const more = create("button", "link", texts.moreHits(number.format(hits.length - FIRST_HITS)))
  more.addEventListener("click", () => {
    const next = list.children.length
    more.remove()
    add(hits.slice(FIRST_HITS))
    list.children[next]?.firstChild.focus()
  })
  const box = document.createDocumentFragment()
  box.append(list, more)
  return box
}

function createHit(recording, [start, end]) {
  const at = wordAt(recording, start)
  const [from, to] = around(recording.text, start, end)
  const snippet = create("span", "snippet", from ? "… " : "")
  snippet.lang = data.language
  const mark = create("mark", "", recording.text.slice(start, end))
  const after = to < recording.text.length ? " …" : ""
  snippet.append(recording.text.slice(from, start), mark, recording.text.slice(end, to) + after)
  const button = create("button", "hit", create("span", "time", clock(at.time)), snippet)
  button.addEventListener("click", () => play(recording, at))
  button.disabled = !recording.audio
  return button
}

// Return where a snippet begins and ends: between words.
function around(text, start, end) {
  const from = start - SNIPPET_CHARS
  const to = end + SNIPPET_CHARS
  const before = from > 0 ? text.indexOf(" ", from) + 1 : 0
  const after = to < text.length ? text.lastIndexOf(" ", to) : text.length
  return [before && before <= start ? before : Math.max(from, 0), after >= end ? after : Math.min(to, text.length)]
}

// Return the line, the word's number in it and the time (hundredths of a second) at a position of a recording's text.
function wordAt(recording, position) {
  let low = 0
  let high = recording.starts.length - 1
  while (low < high) {
    const middle = (low + high + 1) >> 1
    if (recording.starts[middle] <= position) low = middle
    else high = middle - 1
  }
  const [start, text, , starts] = recording.lines[low]
  const word = text.slice(0, position - recording.starts[low]).split(" ").length - 1
  return { line: low, word, time: start + (starts?.[word] ?? 0) }
}

function createTranscript(recording) {
  const details = create("details", "", create("summary", "", texts.whole_text))
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(createText(recording))
  })
  return details
}

function createText(recording) {
  const box = create("div", "text")
  box.lang = data.language
  if (recording.lines.some(line => /[0-4]/.test(line[4] ?? ""))) box.append(create("p", "soft", texts.unsure))
  recording.lines.forEach((line, index) => {
    const time = create("button", "time", clock(line[0]))
    time.setAttribute("aria-label", `${texts.play} ${clock(line[0])}`)
    time.disabled = !recording.audio
    time.addEventListener("click", () => play(recording, { line: index, time: line[0] }))
    box.append(create("p", "", time, createLine(recording, index)))
  })
  return box
}

function createLine(recording, index) {
  const [start, text, speaker, starts, confidences] = recording.lines[index]
  const line = create("span", "", ...(speaker ? [create("span", "speaker", `${speaker}: `)] : []))
  text.split(" ").forEach((text, word) => {
    const element = create("span", "word", text)
    if (confidences && confidences[word] < UNSURE) {
      element.classList.add("unsure")
      element.title = texts.confidence(10 * confidences[word] + 5)
    }
    if (recording.audio) {
      const time = start + (starts?.[word] ?? 0)
      element.addEventListener("click", () => play(recording, { line: index, time }))
    }
    line.append(element, " ")
  })
  return line
}

function clock(hundredths) {
  const seconds = Math.floor(hundredths / 100)
  const parts = [Math.floor(seconds / 60) % 60, seconds % 60].map(part => String(part).padStart(2, "0"))
  const hours = Math.floor(seconds / 3600)
  return hours ? `${hours}:${parts.join(":")}` : parts.join(":").replace(/^0/, "")
}

// --- player ----------------------------------------------------------------------------------------------------------

function play(recording, at) {
  const isOther = current?.recording !== recording
  current = { recording, line: -1, word: -1 }
  find("player").hidden = false
  find("failed").hidden = true
  find("playing").textContent = recording.name
  if (isOther || audio.error) audio.src = recording.audio
  audio.currentTime = Math.max(at.time / 100 - LEAD_S, 0) // before the metadata are there, it is the start
  showSpoken()
  audio.play().catch(() => {}) // the event `error` says why
}

// Show the line that is being spoken, and mark its word.
function showSpoken() {
  if (!current) return
  const { recording } = current
  const now = 100 * audio.currentTime + 100 * LEAD_S
  const index = Math.max(
    recording.lines.findLastIndex(line => line[0] <= now),
    0
  )
  const [start, , , starts = []] = recording.lines[index] ?? [0, ""]
  const word = starts.findLastIndex(time => start + time <= now)
  if (index === current.line && word === current.word) return
  if (index !== current.line && recording.lines.length) {
    find("speaking").replaceChildren(createLine(recording, index))
    find("speaking").lang = data.language
  }
  const words = find("speaking").querySelectorAll(".word")
  words.forEach((element, i) => {
    element.classList.toggle("spoken", i === word)
  })
  current.line = index
  current.word = word
}

audio.addEventListener("timeupdate", showSpoken)
audio.addEventListener("error", () => {
  find("failed").textContent = texts.failed
  find("failed").hidden = false
})

// --- page ------------------------------------------------------------------------------------------------------------

function localize() {
  document.documentElement.lang = locale
  document.title = texts.title
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = texts[element.dataset.text]
}

function moveFocus(step) {
  const targets = [find("query"), ...document.querySelectorAll(".hit:not(:disabled)")]
  const next = targets[targets.indexOf(document.activeElement) + step]
  next?.focus()
  next?.scrollIntoView({ block: "center" })
}

function handleKey(event) {
  const isTyping = event.target.matches("input[type=search]")
  const isMoving = event.target === find("query") || event.target.matches(".hit")
  if (event.key === "/" && !isTyping && !event.ctrlKey && !event.metaKey && !event.altKey) find("query").focus()
  else if (event.key === "ArrowDown" && isMoving) moveFocus(1)
  else if (event.key === "ArrowUp" && isMoving) moveFocus(-1)
  else if (event.key === "Escape" && event.target.matches(".hit")) find("query").focus()
  else return
  event.preventDefault()
}

let waiting = 0
function searchSoon() {
  clearTimeout(waiting)
  waiting = setTimeout(search, 60)
}

localize()
document.addEventListener("keydown", handleKey)
document.querySelector("form").addEventListener("submit", event => event.preventDefault())
for (const id of ["query", "names"]) find(id).addEventListener("input", searchSoon)
for (const id of ["whole", "accents"]) find(id).addEventListener("change", search)
find("more").addEventListener("click", () => {
  const next = find("results").children.length
  showMore()
  find("results").children[next]?.querySelector("button, summary")?.focus()
})
search()
