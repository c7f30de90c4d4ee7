// Turn each table of texts by training step into a player: one step at a time, with buttons, without a kernel.
// Without this script, as on GitHub, the table shows all steps.
;(() => {
  const PAUSE_MS = 1500

  function button(text, title, onClick) {
    const made = document.createElement("button")
    made.type = "button"
    made.textContent = text
    made.title = title
    made.style.cssText =
      "color: inherit; background: none; border: 1px solid currentColor; border-radius: 4px; " +
      "padding: 2px 10px; min-width: 2.6em; font: inherit; cursor: pointer"
    made.addEventListener("click", onClick)
    return made
  }

  function makePlayer(table) {
    const rows = [...table.querySelectorAll("tr[data-step]")]
    const steps = [...new Set(rows.map(row => row.dataset.step))]
    if (steps.length < 2) return
    const heights = [...table.tBodies].map(body =>
      Math.max(...[...body.querySelectorAll("tr[data-step]")].map(row => row.offsetHeight))
    )
    const width = table.offsetWidth
    const firstColumn = table.rows[0].cells[0]
    firstColumn.style.minWidth = `${firstColumn.offsetWidth}px`
    table.style.tableLayout = "auto" // pages of nbconvert make all columns equally wide
    let position = 0
    let timer = 0
    let showsAll = false

    const slider = document.createElement("input")
    slider.type = "range"
    slider.max = steps.length - 1
    slider.setAttribute("aria-label", "training step")
    slider.style.cssText = "flex: 0 1 12em; accent-color: #3f7cc0"
    const label = document.createElement("output")
    label.style.cssText = "min-width: 6em; font-weight: bold"

    function draw() {
      for (const [n, body] of [...table.tBodies].entries()) {
        for (const row of body.querySelectorAll("tr[data-step]")) {
          row.hidden = !showsAll && row.dataset.step !== steps[position]
          row.style.display = row.hidden ? "none" : "" // a page's own style may show hidden rows
          row.style.height = showsAll || !heights[n] ? "" : `${heights[n]}px` // the table does not jump
        }
      }
      if (width) table.style.minWidth = `${width}px`
      slider.value = position
      label.textContent = showsAll ? "all steps" : `step ${steps[position]}`
      play.textContent = timer ? "❚❚" : "▶"
      play.title = timer ? "pause" : "play"
      all.textContent = showsAll ? "one step" : "all steps"
    }

    function stop() {
      clearInterval(timer)
      timer = 0
    }

    function show(next) {
      showsAll = false
      position = Math.min(Math.max(next, 0), steps.length - 1)
      if (position === steps.length - 1) stop()
      draw()
    }

    function toggle() {
      if (timer) {
        stop()
        draw()
        return
      }
      timer = setInterval(() => (table.isConnected ? show(position + 1) : stop()), PAUSE_MS)
      show(position === steps.length - 1 ? 0 : position)
    }

    function move(change) {
      stop()
      show(position + change)
    }

    const play = button("▶", "play", toggle)
    const all = button("all steps", "show all steps, or one", () => {
      stop()
      showsAll = !showsAll
      draw()
    })
    slider.addEventListener("input", () => move(Number(slider.value) - position))
    const bar = document.createElement("div")
    bar.style.cssText = "display: flex; flex-wrap: wrap; align-items: center; gap: 8px; margin: 6px 0"
    bar.append(
      button("‹", "one step back", () => move(-1)),
      play,
      button("›", "one step on", () => move(1)),
      slider,
      label,
      all
    )
    table.before(bar)
    draw()
  }

  for (const table of document.querySelectorAll("table.lab-steps:not([data-plays])")) {
    table.dataset.plays = ""
    makePlayer(table)
  }
})()
