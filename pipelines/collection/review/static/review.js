// Keys of the review page. Runs after the app's script, in its scope.
;(() => {
  const find = selector => document.querySelector(selector)
  const click = selector => find(selector)?.click()
  const player = () => find("#review-player")
  const play = () => player() && (player().paused ? player().play() : player().pause())
  const edit = () => {
    const field = find("#correction textarea")
    field?.focus()
    field?.setSelectionRange(field.value.length, field.value.length)
  }
  document.addEventListener("keydown", event => {
    const field = event.target.closest?.("#correction textarea")
    if (field && event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault()
      field.blur()
      return click("#save")
    }
    if (event.key === "Escape") return document.activeElement?.blur()
    if (event.target.closest?.("input, textarea, select, audio") || !find("#before")) return
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return
    const isOnButton = event.target.closest?.("button")
    const actions = { a: () => click("#accept"), r: () => click("#reject"), e: edit, " ": play }
    const action = actions[event.key.toLowerCase()]
    if (!action || (isOnButton && event.key === " ")) return
    event.preventDefault()
    action()
  })
})()
