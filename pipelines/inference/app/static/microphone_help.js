// Says why a microphone cannot be used, or that it has gone away: in the recorder, whose own errors Gradio shows nowhere,
// and for live transcription.

export function createMicrophoneHelp({ message }) {
  const REASONS = {
    NotAllowedError: "blocked",
    SecurityError: "blocked",
    NotFoundError: "absent",
    OverconstrainedError: "absent",
    NotReadableError: "in_use",
    AbortError: "in_use"
  }
  const find = selector => document.querySelector(selector)

  // Firefox and Safari do not tell the policy of a frame.
  const isFrameWithoutMicrophone = () => {
    const policy = document.permissionsPolicy ?? document.featurePolicy
    return window !== window.top && !policy?.allowsFeature("microphone")
  }

  const explain = error => {
    if (!window.isSecureContext || !navigator.mediaDevices) return message("microphone_insecure")
    const reason = REASONS[error?.name] ?? "failed"
    return message(`microphone_${reason === "blocked" && isFrameWithoutMicrophone() ? "framed" : reason}`)
  }

  const showAtRecorder = text => {
    const isVisible = find("#recording")?.offsetParent
    if (isVisible || !text) find("#recorder-note").textContent = text
  }

  // Gradio's recorder calls the same function of the browser as live transcription.
  const watch = () => {
    const devices = navigator.mediaDevices
    if (!devices) {
      document.addEventListener("click", event => {
        if (event.target.closest?.("#recording .record-button")) showAtRecorder(explain())
      })
      return
    }
    const getUserMedia = devices.getUserMedia.bind(devices)
    devices.getUserMedia = async constraints => {
      try {
        const stream = await getUserMedia(constraints)
        showAtRecorder("")
        for (const track of stream.getTracks())
          track.addEventListener("ended", () => showAtRecorder(message("microphone_lost")))
        return stream
      } catch (error) {
        showAtRecorder(explain(error))
        throw error
      }
    }
  }

  return { explain, watch }
}
