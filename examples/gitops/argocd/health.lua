-- Health of a FineTuneJob or a HyperparameterSweep as Argo CD shows it.
-- Lua there has only the base, table and os libraries: no string, no math.
local status = obj.status or {}
local conditions = {}
for _, condition in ipairs(status.conditions or {}) do
  conditions[condition.type] = condition
end

local function is_true(kind)
  return conditions[kind] ~= nil and conditions[kind].status == "True"
end

-- First, because they are final: what is finished never runs again, whatever is changed afterwards.
if is_true("Failed") then
  return { status = "Degraded", message = conditions.Failed.reason .. ": " .. conditions.Failed.message }
end
if is_true("Complete") then
  return { status = "Healthy", message = conditions.Complete.message }
end

if status.observedGeneration == nil or status.observedGeneration < obj.metadata.generation then
  return { status = "Progressing", message = "The operator has not seen this version yet." }
end
-- Only where it is wanted: what is being resumed still has the condition for a moment.
if obj.spec.suspend and is_true("Suspended") then
  return { status = "Suspended", message = conditions.Suspended.message }
end

local message = status.state or "Pending"
local running = conditions.Running or {}
if running.status == "True" then
  -- A job tells of its training, a sweep of its trials.
  local trainer = status.trainerStatus or {}
  if trainer.progressPercentage ~= nil then
    message = message .. ", " .. trainer.progressPercentage .. " %"
  elseif status.progress ~= nil then
    message = message .. ", " .. status.progress .. " trials"
  end
  local seconds = trainer.estimatedRemainingSeconds or status.estimatedRemainingSeconds
  if seconds ~= nil then
    message = message .. ", about " .. (seconds - seconds % 60) / 60 + 1 .. " min left"
  end
elseif running.message ~= nil and running.message ~= "" then
  message = message .. ": " .. running.message
end
return { status = "Progressing", message = message }
